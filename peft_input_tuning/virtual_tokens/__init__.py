"""Virtual tokens in a call: how they get into the backbone's batch and its cache, and out of what it returns.

    entrance ──► with_prompt ──► start, packed, go_on ──► backbone ──► outputs
    backbone: which module, and what is to be known of it        trial: what only a run tells

`layout.py` is pure functions of tensors and knows torch only. `subclass.py` is how modules get more than their class.
"""
