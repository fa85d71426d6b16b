"""The AR baseline's weights in other libraries, each of which runs them as it does its own users' models.

All three read a Llama, so that one export serves: :func:`export_llama`. They compute in the weights' type, in
as many threads as torch, and write the tokens that the baseline writes. What a library cannot compute, or not
there, it says by a ValueError or RuntimeError when it loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.generation.job import Job, Peer, Prompts, Write
from colada.files import write_text
from colada.networks.decoder import Decoder, DecoderBlock

POSITIONS = 2**15  # For which rotary tables are made.
SPARE = 16  # Rows of a vocabulary that needs a token which ends a text; multiplied as fast as without.


def export_llama(decoder: Decoder, directory: Path, spare: int = 0) -> None:
    """Write a decoder as a Llama in the hub's form, with a tokenizer whose tokens are named by their ids.

    Args:
        spare: tokens after the vocabulary's own, with zeros for weights; the last of all is the end.
    """
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = decoder.config
    vocab = config.vocab_size + spare

    def padded(weight: Tensor) -> Tensor:
        return F.pad(weight, (0, 0, 0, spare))

    weights = {
        "model.embed_tokens.weight": padded(decoder.wte.weight),
        "model.norm.weight": decoder.final_norm.weight,
        "lm_head.weight": padded(decoder.lm_head.weight),
    }
    for layer, block in enumerate(decoder.blocks):
        assert isinstance(block, DecoderBlock)
        q, k, v = block.qkv_proj.weight.chunk(3)
        up, gate = block.ffn_proj.weight.chunk(2)
        names = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn_out_proj.weight,
            "mlp.up_proj": up,
            "mlp.gate_proj": gate,
            "mlp.down_proj": block.ffn_out.weight,
            "input_layernorm": block.norm_attn.weight,
            "post_attention_layernorm": block.norm_ffn.weight,
        }
        weights |= {f"model.layers.{layer}.{name}.weight": weight for name, weight in names.items()}
    fresh = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    save_file(fresh, directory / "model.safetensors", {"format": "pt"})
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": vocab - 1,
        "torch_dtype": str(decoder.wte.weight.dtype).removeprefix("torch."),
    }
    write_text(directory / "config.json", json.dumps(keys))
    Tokenizer(WordLevel({str(token): token for token in range(vocab)}, "0")).save(
        str(directory / "tokenizer.json")
    )
    special = {"bos_token": str(config.bos_token_id), "eos_token": str(vocab - 1), "unk_token": "0"}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    write_text(directory / "tokenizer_config.json", json.dumps(named))


@contextmanager
def exported(decoder: Decoder, spare: int = 0) -> Iterator[Path]:
    """Export a decoder for a while: to a directory that is removed when its model is loaded."""
    with tempfile.TemporaryDirectory() as directory:
        export_llama(decoder, Path(directory), spare)
        yield Path(directory)


def transformers(decoder: Decoder) -> Peer:
    """Return ``generate`` of transformers with a static cache."""
    import transformers as library

    library.utils.logging.disable_progress_bar()
    weight, bos = decoder.wte.weight, decoder.config.bos_token_id
    with exported(decoder) as directory:
        model = library.AutoModelForCausalLM.from_pretrained(directory, dtype=weight.dtype).to(weight.device)

    def run(prompts: Prompts, job: Job, write: Write) -> None:
        ids = torch.tensor([[bos, *prompt] for prompt in prompts], device=weight.device)

        def told(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            for index, token in enumerate(ids[:, -1].tolist()):
                write(index, [token])
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.new_tokens,
            do_sample=False,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=bos,
            stopping_criteria=[told],
        )

    return run


def ctranslate2(decoder: Decoder) -> Peer:
    """Return ``generate_batch`` of CTranslate2's generator."""
    import ctranslate2 as library

    weight, bos = decoder.wte.weight, decoder.config.bos_token_id
    kind = str(weight.dtype).removeprefix("torch.")
    with exported(decoder) as directory:
        converted = str(directory / "ctranslate2")
        library.converters.TransformersConverter(str(directory)).convert(converted, quantization=kind)
        model = library.Generator(
            converted,
            device=weight.device.type,
            device_index=weight.device.index or 0,
            compute_type=kind,
            intra_threads=torch.get_num_threads(),
        )

    def run(prompts: Prompts, job: Job, write: Write) -> None:
        def told(step: Any) -> bool:
            write(step.batch_id, [step.token_id])
            return False

        model.generate_batch(
            [[str(token) for token in (bos, *prompt)] for prompt in prompts],
            max_length=job.new_tokens,
            include_prompt_in_result=False,
            end_token=[],
            callback=told,
        )

    return run


def onnxruntime_genai(decoder: Decoder) -> Peer:
    """Return the generator of onnxruntime-genai, on the graph that its own model builder makes."""
    import numpy as np
    import onnxruntime_genai as library

    weight, bos = decoder.wte.weight, decoder.config.bos_token_id
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[weight.dtype]
    # It knows no text without an end: a token beyond the vocabulary is one, and is kept from being written.
    with exported(decoder, SPARE) as directory:
        graph = directory / "graph"
        words = ["-m", "onnxruntime_genai.models.builder", "-i", str(directory), "-o", str(graph)]
        words += ["-p", kind, "-e", weight.device.type, "-c", str(directory / "cache")]
        built = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise RuntimeError("".join((built.stderr.strip() or built.stdout.strip()).splitlines()[-1:]))
        file = graph / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = torch.get_num_threads()
        write_text(file, json.dumps(config))
        model = library.Model(str(graph))

    def run(prompts: Prompts, job: Job, write: Write) -> None:
        length = 1 + job.context + job.new_tokens
        parameters = library.GeneratorParams(model)
        parameters.set_search_options(
            batch_size=job.batch, max_length=length, min_length=length, do_sample=False
        )
        generator = library.Generator(model, parameters)
        generator.append_tokens(np.array([[bos, *prompt] for prompt in prompts], dtype=np.int32))
        for _ in range(job.new_tokens):
            generator.generate_next_token()
            for index, token in enumerate(generator.get_next_tokens()):
                write(index, [int(token)])

    return run


MAKERS: dict[str, Callable[[Decoder], Peer]] = {
    "transformers": transformers,
    "ctranslate2": ctranslate2,
    "onnxruntime-genai": onnxruntime_genai,
}
