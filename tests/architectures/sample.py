"""Forty architectures, one for each thing in which they differ from a plain decoder."""

SAMPLE = {
    # positions
    "rotary positions, grouped heads": "LlamaForCausalLM",
    "learned positions": "GPT2LMHeadModel",
    "learned positions from the mask, with an offset, a narrower embedding": "OPTForCausalLM",
    "attention biases in place of positions": "MptForCausalLM",
    "sinusoids, scaled embeddings, mask by the pad's id": "XGLMForCausalLM",
    "positions of three axes": "Qwen2_5_VLForConditionalGeneration",
    "sections of rotary positions": "Glm4vForConditionalGeneration",
    # attention
    "sliding window and full attention in turns, scaled embeddings": "Gemma2ForCausalLM",
    "two rotary bases": "Gemma3ForCausalLM",
    "local and global attention in turns": "GPTNeoForCausalLM",
    "latent keys and values": "DeepseekV3ForCausalLM",
    "attention in chunks": "Llama4ForCausalLM",
    "sinks": "GptOssForCausalLM",
    "compressed attention, experts by the token's id": "DeepseekV4ForCausalLM",
    "differences of two attentions": "DiffLlamaForCausalLM",
    "keys and values fused": "BloomForCausalLM",
    # states
    "a state alone": "MambaForCausalLM",
    "a state with heads": "Mamba2ForCausalLM",
    "state and attention in each layer, scaled embeddings": "FalconH1ForCausalLM",
    "state and attention in turns": "BambaForCausalLM",
    "layers that share attention": "Zamba2ForCausalLM",
    "convolutions": "Lfm2ForCausalLM",
    "linear attention": "Qwen3NextForCausalLM",
    "recurrence inside of the layers": "RecurrentGemmaForCausalLM",
    "tokens one after the other": "RwkvForCausalLM",
    # what ids are used for elsewhere
    "vectors for each layer": "Gemma3nForCausalLM",
    "masks made around the backbone": "Gemma3ForConditionalGeneration",
    "a prefix that sees itself": "PaliGemmaForConditionalGeneration",
    "masks and positions as keyword arguments": "OmniASRForConditionalGeneration",
    "a text model that generates inside": "BlipForConditionalGeneration",
    "a prefill that a window keeps": "UnlimitedOcrForConditionalGeneration",
    "images in the text": "LlavaForConditionalGeneration",
    "embeddings that are normalized": "MuseGlimmerForConditionalGeneration",
    # experts
    "experts, all shapes alike": "MixtralForCausalLM",
    # encoders and decoders
    "relative positions, encoder and decoder": "T5ForConditionalGeneration",
    "learned positions, encoder and decoder": "BartForConditionalGeneration",
    "sinusoids and scaled embeddings, encoder and decoder": "MarianMTModel",
    "positions from the pad's id": "M2M100ForConditionalGeneration",
    "a decoder of its own": "TrOCRForCausalLM",
    # encoders
    "learned positions, token types": "BertForMaskedLM",
    "positions from the pad's id, encoder": "RobertaForMaskedLM",
    "positions from 2": "MraForMaskedLM",
    "disentangled attention": "DebertaV2ForMaskedLM",
    "alternating windows, unpadded": "ModernBertForMaskedLM",
    "no mask at all": "FNetForMaskedLM",
    "two streams of attention": "XLNetLMHeadModel",
}
