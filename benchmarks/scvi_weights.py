"""scvi-tools' weights in our networks: what both then compute is the same, as parity tests show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coembed.errors import CoembedError
from coembed.models.base import Model
from coembed.nn.sparse import Linear

Tensors = Mapping[str, Tensor]

TOTALVI = {
    "encoder.encoder.": "encoder.",
    "encoder.z_mean_encoder.": "mean.",
    "encoder.z_var_encoder.": "log_var.",
    "decoder.px_decoder.": "genes.trunk.",
    "decoder.px_scale_decoder.fc_layers.Layer 0.0.": "genes.heads.0.",
    "decoder.py_back_decoder.": "proteins.background.trunk.",
    "decoder.py_back_mean_log_alpha.fc_layers.Layer 0.0.": "proteins.background.heads.0.",
    "decoder.py_back_mean_log_beta.fc_layers.Layer 0.0.": "proteins.background.heads.1.",
    "decoder.py_fore_decoder.": "proteins.foreground.trunk.",
    "decoder.py_fore_scale_decoder.fc_layers.Layer 0.0.": "proteins.foreground.heads.0.",
    "decoder.sigmoid_decoder.": "proteins.mixing.trunk.",
    "decoder.py_background_decoder.fc_layers.Layer 0.0.": "proteins.mixing.heads.0.",
    "px_r": "free.log_theta",
    "py_r": "free.log_phi",
    "background_pro_alpha": "prior.mean",
    "background_pro_log_beta": "prior.log_sd",
    "log_per_batch_efficiency": "efficiency.log",
}
"""Prefixes, scvi-tools' -> ours; its library encoder and its zero inflation are not ours."""
TABLES = ("background_pro", "log_per_batch")
"""scvi-tools' are (proteins, batches), ours (batches, proteins)."""

UNUSED = ("encoder.l_gene", "decoder.px_dropout_decoder_gene")

LAYERS = ["fc_layers.Layer 0.0", "fc_layers.Layer 1.0"]
LONG = {"rna": "expression", "atac": "accessibility", "prot": "protein"}


def totalvi(theirs: Tensors, roles: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return tensors by scvi-tools' names of totalVI under ours; its modalities are always two."""
    out = {}
    for name, value in theirs.items():
        if name.startswith(UNUSED):
            continue
        prefix = next(p for p in TOTALVI if name.startswith(p))
        ours = TOTALVI[prefix] + name.removeprefix(prefix)
        ours = re.sub(r"fc_layers\.Layer (\d)\.", r"layers.\1.", ours)
        out[ours] = value.T if name.startswith(TABLES) else value
    return out


def multivi(theirs: Tensors, roles: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors by scvi-tools' names of MultiVI under ours; it has networks for all roles."""
    return {ours: theirs[name] for ours, name in multivi_names(roles).items()}


def multivi_names(roles: Sequence[str]) -> dict[str, str]:
    """Return our names of MultiVI's parameters -> scvi-tools'."""
    full = {f"{a}.{end}": f"{b}.{end}" for a, b in _layers(roles) for end in ("weight", "bias")}
    free = {"rna": "px_r", "atac": "region_factors", "prot": "py_r"}
    return full | {f"free.{m}": free[m] for m in roles}


def as_ours(value: Tensor, name: str, net: nn.Module) -> Tensor:
    """Return a parameter of theirs, or its gradient, in the layout of ours in `net`."""
    owner = net.get_submodule(name.rpartition(".")[0])
    return value.T if isinstance(owner, Linear) and name.endswith("weight") else value


def _layers(roles: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of linear layers, ours and theirs."""
    pairs = [("gate", "z_decoder_expression.px_dropout_decoder")]
    for m in roles:
        long = LONG[m]
        pairs.append((f"mean.{m}", f"z_encoder_{long}.mean_encoder"))
        pairs.append((f"log_var.{m}", f"z_encoder_{long}.var_encoder"))
        for i, layer in enumerate(LAYERS):
            # Ours are linear, norm, activation; the encoder has a dropout after these.
            pairs.append((f"encoder.{m}.{4 * i}", f"z_encoder_{long}.encoder.{layer}"))
            if m == "prot":
                pairs += [
                    (f"decoder.prot.{part}.trunk.layers.{i}.0", f"z_decoder_pro.{trunk}.{layer}")
                    for part, trunk in (
                        ("background", "py_back_decoder"),
                        ("foreground", "py_fore_decoder"),
                        ("mixing", "sigmoid_decoder"),
                    )
                ]
                continue
            pairs.append((f"depth.{m}.0.{3 * i}", f"l_encoder_{long}.px_decoder.{layer}"))
            pairs.append((f"decoder.{m}.layers.{i}.0", f"z_decoder_{long}.px_decoder.{layer}"))
        if m == "prot":
            pairs += [
                (f"decoder.prot.{part}.heads.{i}", f"z_decoder_pro.{head}.{LAYERS[0]}")
                for part, i, head in (
                    ("background", 0, "py_back_mean_log_alpha"),
                    ("background", 1, "py_back_mean_log_beta"),
                    ("foreground", 0, "py_fore_scale_decoder"),
                    ("mixing", 0, "py_background_decoder"),
                )
            ]
        else:
            head = "px_scale_decoder.0" if m == "rna" else "output.0"
            pairs.append((f"depth.{m}.1", f"l_encoder_{long}.output.0"))
            pairs.append((f"output.{m}", f"z_decoder_{long}.{head}"))
    return pairs


def load(name: str, model: Model, module: nn.Module) -> None:
    """Put the weights of scvi-tools' `module` into `model`, which is trained and of its sizes.

    What a training finds in the data (which features a batch measured) and the batches' classifier,
    which no objective holds, stay as they are.

    Raises:
        CoembedError: a weight has no counterpart.
    """
    theirs = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    found = {"totalvi": totalvi, "multivi": multivi}[name](theirs, model.roles)
    found = {key: as_ours(value, key, model.net) for key, value in found.items()}
    missing, unknown = model.net.load_state_dict(found, strict=False)
    missing = [key for key in missing if not key.startswith(("measured.", "classifier."))]
    if missing or unknown:
        raise CoembedError(
            f"weights of scvi-tools without a counterpart: {[*missing, *unknown]}",
            where=name,
            remedy="Bring benchmarks/scvi_weights.py up to date with the parity tests",
        )


def sizes(name: str, module: nn.Module) -> dict[str, int]:
    """Return the hyper-parameters that give our networks the widths of `module`."""
    heads = {"totalvi": "encoder.z_mean_encoder", "multivi": "z_encoder_expression.mean_encoder"}
    head: Any = module.get_submodule(heads[name])
    return {"n_hidden": int(head.in_features), "n_latent": int(head.out_features)}
