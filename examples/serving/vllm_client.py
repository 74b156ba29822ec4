"""Asks a server of `vllm_server.sh`: an adapter is a model's name.

python examples/serving/vllm_client.py e2e "name[The Punter], food[Indian], area[riverside]"
"""

from __future__ import annotations

import sys

import openai

client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
adapter, text = sys.argv[1:]
# The prompt as the adapter was trained on it: the examples put a line break behind the source.
for part in client.completions.create(model=adapter, prompt=text + "\n", max_tokens=64, temperature=0, stream=True):
    print(part.choices[0].text, end="", flush=True)
print()
