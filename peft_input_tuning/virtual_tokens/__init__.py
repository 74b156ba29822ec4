"""Virtual tokens in a call: how they get into the backbone's batch and its cache, and out of what it returns.

    hooks ──► call ──► layout                                backbone: which module, and what is to be known of it

`layout.py` is pure functions of tensors and knows torch only.
"""
