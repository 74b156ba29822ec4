#!/bin/sh
# Serves a base model and adapters of input-tuning, each under a name, with vLLM's server of OpenAI's format:
#
#     sh examples/serving/vllm_server.sh BASE e2e=my-e2e-adapter overnight=my-overnight-adapter
#
# BASE is the folder or hub id of the base model, the rest are adapters' folders as save_pretrained wrote them. Options of
# vLLM may follow: --dtype float32 for the tokens of a float32 model, which vLLM turns into bfloat16 otherwise.
set -e
base=$1
shift
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True # POST /v1/load_lora_adapter, /v1/unload_lora_adapter
exec python -m vllm.entrypoints.openai.api_server --model "$base" \
    --enable-lora --lora-target-modules embed_tokens --max-loras 8 --lora-modules "$@"
