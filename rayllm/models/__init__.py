"""The models that rayllm runs: one decoder, of which Llama, Mistral, Qwen2 and Qwen3 are configurations."""

from rayllm.models.decoder import Attend, Decoder, build_model

__all__ = ["Attend", "Decoder", "build_model"]
