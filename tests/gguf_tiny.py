"""A tiny model with its tokenizer, and the same as a GGUF file by the `gguf` package's own writer, to measure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from finetune.data.samples import sample_rows

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'tool' -%}{{- raise_exception('no tools, please') -}}{%- endif -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ (message['content'] | trim) ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def sample_messages() -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in sample_rows().read_text(encoding="utf-8").splitlines()]


def make_tokenizer() -> Any:
    """Byte-level BPE in GPT-2's way, with a BOS that both the tokenizer and the template put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [message["content"] for messages in sample_messages() for message in messages]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def make_model(vocabulary: int) -> Any:
    """A tiny Qwen 2 whose predictions are far from uniform."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
        rope_theta=10000.0,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight += torch.randn_like(weight) * 0.3
    return model


def write_gguf(
    model: Any,
    tokenizer: Any,
    file: Path,
    template: str | None = TEMPLATE,
    end: int = 2,
    weights: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    tokens: Callable[[list[str]], list[str]] = lambda tokens: tokens,
) -> Path:
    """The model in float32; `template`, `end` (of turn), `weights` and `tokens` make it a wrong one."""
    config = model.config
    writer = GGUFWriter(file, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_token_list(tokens(names))
    writer.add_token_types([3 if name in SPECIAL else 1 for name in tokens(names)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    state = model.state_dict()

    def put(ours: str, theirs: str) -> None:
        writer.add_tensor(ours, weights(ours, state[theirs].float()).numpy())

    put("token_embd.weight", "model.embed_tokens.weight")
    put("output_norm.weight", "model.norm.weight")
    for i in range(config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            for kind in ("weight", "bias"):
                if (name := f"model.layers.{i}.{theirs}.{kind}") in state:
                    put(f"blk.{i}.{ours}.{kind}", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
