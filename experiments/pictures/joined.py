"""A model of one's text and another's pictures."""

from __future__ import annotations

from dataclasses import replace

from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.networks.dit import DiT


def beside(text: ColaDLM, pictures: ColaDLM) -> ColaDLM:
    """Return a model whose text is the first one's, and whose pictures have the weights of the second one.

    All its layers are dual. What pictures have learnt with the text of their own model they have to learn
    again with this one, which differs the less the less their model has changed it.

    Raises:
        ColadaError: for models of different Text VAEs, or without pictures.
    """
    if not pictures.dit.config.img_channels:
        raise ColadaError("the second model has no pictures: img_channels=0")
    if not text.shares_vae(pictures):
        raise ColadaError("the models have different Text VAEs, expected one")
    config = replace(pictures.dit.config, dual_layers=pictures.dit.config.num_layers)
    dit = DiT(config).to(text.dit.txt_in.proj.weight)
    of_text, of_pictures = text.dit.state_dict(), pictures.dit.state_dict()
    for name, tensor in dit.state_dict().items():
        shared = name.replace(".image.", ".")  # Of layers that were single, pictures' weights are text's.
        source = of_pictures if shared != name or name.startswith("img_") else of_text
        tensor.copy_(source[name if name in source else shared])
    return ColaDLM(text.vae, dit, text.tokenizer, generation=text.generation, image=pictures.codec())
