"""What scvi-tools' totalVI computes from given weights, counts and noise.

`totalvi_1.3.0.safetensors` holds it for the last release with the paper's equations:

    python3 -m venv /tmp/scvi130 && /tmp/scvi130/bin/pip install scvi-tools==1.3.0 safetensors
    /tmp/scvi130/bin/python tests/models/golden/make_totalvi.py

The parity test also calls `reference` with the scvi-tools that is installed beside the tests.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

GOLDEN = Path(__file__).with_name("totalvi_1.3.0.safetensors")
CASES = [(n_batches, masked) for n_batches in (1, 3) for masked in (False, True)]
N, GENES, PROTEINS, HIDDEN, LATENT, KL_WEIGHT = 15, 20, 6, 16, 4, 0.3


class Mask(np.ndarray):
    """A mask that scvi-tools cannot make float32."""

    def astype(self, dtype: object) -> np.ndarray:
        return np.array(self, dtype=np.float64)


def inputs(n_batches: int, masked: bool) -> dict[str, Tensor]:
    """Counts, batch codes and noise; masked: batch 0 lacks proteins 1 and 4, batch 2 all."""
    random = np.random.default_rng(5)
    x, y = random.negative_binomial(1, 0.3, (N, GENES)), random.negative_binomial(1, 0.1, (N, 6))
    codes = np.arange(N) % n_batches
    if masked:
        y[np.ix_(codes == 0, [1, 4])] = 0
        y[codes == 2] = 0
    noise = {LATENT: random.normal(size=(N, LATENT)), PROTEINS: random.normal(size=(N, PROTEINS))}
    parts = {"x": x, "y": y, "codes": codes, "noise_z": noise[LATENT], "noise_y": noise[PROTEINS]}
    return {name: torch.from_numpy(np.asarray(part)) for name, part in parts.items()}


def reference(n_batches: int, masked: bool, *, background_sd: str) -> dict[str, Tensor]:
    """Weights, posterior, loss terms and gradients in float64, in training mode, dropout off.

    Args:
        n_batches: number of batches.
        masked: whether proteins are missing.
        background_sd: 'exp' (the paper) or 'softplus' (scvi-tools from 1.2 on).
    """
    import inspect

    from scvi.module import TOTALVAE

    given = inputs(n_batches, masked)
    panel = {"n_panel": n_batches} if "n_panel" in inspect.signature(TOTALVAE).parameters else {}
    observed = {
        str(b): (given["y"][given["codes"] == b] > 0).any(0).numpy().view(Mask)
        for b in range(n_batches)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = TOTALVAE(
            GENES,
            PROTEINS,
            n_batch=n_batches,
            n_hidden=HIDDEN,
            n_latent=LATENT,
            dropout_rate_decoder=0.0,
            dropout_rate_encoder=0.0,
            protein_batch_mask=observed if masked else None,
            extra_decoder_kwargs={"activation_function_bg": background_sd},
            **panel,
        ).double()
        with torch.no_grad():
            for value in module.state_dict().values():
                if value.is_floating_point():  # no weight, variance or prior is left at its start
                    value.add_(0.1 * torch.randn_like(value))
    weights = {f"weight.{k}": v.clone() for k, v in module.state_dict().items()}
    noise = {LATENT: given["noise_z"], PROTEINS: given["noise_y"], 1: torch.zeros(N, 1)}
    tensors = {
        "X": given["x"].double(),
        "proteins": given["y"].double(),
        "batch": given["codes"].unsqueeze(1),
        "labels": torch.zeros(N, 1, dtype=torch.long),
    }
    with (
        patch.object(Normal, "rsample", lambda q: q.loc + q.scale * noise[q.loc.shape[-1]]),
        patch.object(torch.Tensor, "float", torch.Tensor.double),  # of its one-hots
    ):
        inference, generative, loss = module(tensors, loss_kwargs={"kl_weight": KL_WEIGHT})
    loss.loss.backward()
    q, py = inference["qz"], generative["py_"]
    out = {
        "mean": q.loc,
        "variance": q.scale.square(),
        "shares": generative["px_"]["scale"],
        "background": py["rate_back"],
        "foreground": py["rate_fore"],
        "logit": py["mixing"],
        "reconstruction_rna": loss.reconstruction_loss["reconst_loss_gene"].mean(),
        "reconstruction_prot": loss.reconstruction_loss["reconst_loss_protein"].mean(),
        "kl": loss.kl_local["kl_div_z"].mean(),
        "background_terms": loss.kl_local["kl_div_back_pro"].mean(),
        "loss": loss.loss,
    }
    gradients = {
        f"gradient.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None
    }
    return {name: v.detach().clone() for name, v in {**weights, **out, **gradients}.items()}


if __name__ == "__main__":
    import scvi
    from safetensors.torch import save_file

    if scvi.__version__ != "1.3.0":
        raise SystemExit(f"this is scvi-tools {scvi.__version__}, the file holds 1.3.0")
    file = {
        f"{n_batches}.{masked}.{name}": value.contiguous()
        for n_batches, masked in CASES
        for name, value in reference(n_batches, masked, background_sd="exp").items()
    }
    save_file(file, GOLDEN)
