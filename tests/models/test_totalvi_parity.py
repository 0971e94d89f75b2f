"""totalVI against scvi-tools: the same weights, counts and noise give the same numbers.

The paper's equations against a file written with scvi-tools 1.3.0 (`golden/make_totalvi.py`), those
of 1.3.1 against the scvi-tools that is installed, where one is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import numpy as np
import pytest
import scvi_weights
import torch
from easy import easy_cells
from golden.make_totalvi import (
    CASES,
    GENES,
    GOLDEN,
    HIDDEN,
    KL_WEIGHT,
    LATENT,
    PROTEINS,
    inputs,
    reference,
)
from torch import Tensor

from coembed.data.minibatches import Batch
from coembed.files import read_tensors
from coembed.models.background import background_prior
from coembed.models.totalvi import TotalVI
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock


def renamed(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return scvi-tools' weights or gradients under our names; its tables are (P, B)."""
    prefix = f"{kind}."
    return scvi_weights.totalvi(
        {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    )


def computed(
    want: Mapping[str, Tensor], n_batches: int, masked: bool, equations: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our outputs and gradients from the weights in `want`."""
    given = inputs(n_batches, masked)
    x, y, noise_z, noise_y = (given[k].to(dtype) for k in ("x", "y", "noise_z", "noise_y"))
    codes, n = given["codes"], len(given["codes"])
    cells = easy_cells("cite", 30, n_batches=n_batches)
    model = TotalVI(cells, n_hidden=HIDDEN, n_latent=LATENT, dropout=0.0, equations=equations)
    model.n_features = {"rna": GENES, "prot": PROTEINS}
    model._build()
    missing, unknown = model.net.to(dtype).load_state_dict(renamed(want, "weight"), strict=False)
    assert (missing, unknown) == (["measured.rna", "measured.prot"], [])
    if masked:
        for b in range(n_batches):
            model.net.measured.prot[b] = (y[codes == b] > 0).any(0).to(dtype)
    roles = {"rna": x, "prot": y}
    everywhere = {m: torch.ones(n, dtype=torch.bool) for m in roles}
    batch = Batch(roles, everywhere, dict.fromkeys(roles, codes))
    noise = {LATENT: noise_z, PROTEINS: noise_y}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Gaussian, "sample", lambda q: q.mean + noise[q.mean.shape[-1]] * (q.log_var / 2).exp()
        )
        q = model.posterior(batch)
        z = q.sample()
        proteins = model.proteins(z, codes)
        level = proteins.background.sample().exp()
        out = {
            "mean": q.mean,
            "variance": q.log_var.exp(),
            "shares": model.shares(z, codes),
            "background": level,
            "foreground": level * proteins.fold,
            "logit": proteins.logit,
        }
        terms = model.loss(batch, Clock(0, 1))
    out |= {name: terms[name] for name in ("reconstruction_rna", "reconstruction_prot", "kl")}
    others = ("kl_background", "efficiency", "pull")
    out["background_terms"] = sum(terms[name] for name in others if name in terms)
    annealed = {"kl", *others} | ({"reconstruction_prot"} if equations == "1.3.1" else set())
    out["loss"] = sum(t * (KL_WEIGHT if name in annealed else 1) for name, t in terms.items())
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.net.named_parameters()}


def check(want: Mapping[str, Tensor], n_batches: int, masked: bool, equations: str) -> None:
    # In float64 what is left are the 1e-8 that they add to factors, deviations and NB means.
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        out, gradients = computed(want, n_batches, masked, equations, dtype)
        for name, ours in out.items():
            np.testing.assert_allclose(
                *(ours.detach().numpy(), want[name].numpy()), rtol=tolerance, atol=tolerance,
                err_msg=f"{name}, {dtype}",
            )  # fmt: skip
        theirs = renamed(want, "gradient")
        assert set(gradients) == set(theirs), "a loss reaches every parameter"
        largest = max(float(g.abs().max()) for g in theirs.values())
        for name, ours in gradients.items():
            gap = float((ours - theirs[name]).abs().max())
            # The bias before a batch normalisation has gradient 0: what is seen is rounding.
            assert gap < tolerance * max(float(theirs[name].abs().max()), 0.05 * largest), name


@pytest.mark.parametrize(("n_batches", "masked"), CASES)
def test_the_papers_equations_are_those_of_scvi_tools_1_3_0(n_batches: int, masked: bool) -> None:
    stored, _ = read_tensors(GOLDEN)
    prefix = f"{n_batches}.{masked}."
    want = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    check(want, n_batches, masked, "paper")


@pytest.mark.slow  # scvi-tools takes half a minute to import
@pytest.mark.parametrize(("n_batches", "masked"), CASES)
def test_the_newer_equations_are_those_of_the_installed_scvi_tools(
    n_batches: int, masked: bool
) -> None:
    if importlib.util.find_spec("scvi") is None:
        pytest.skip("scvi-tools is not installed")
    want = reference(n_batches, masked, background_sd="softplus")
    check(want, n_batches, masked, "1.3.1")


@pytest.mark.slow
def test_the_background_prior_is_that_of_scvi_tools() -> None:
    """Both draw their cells: the numbers agree as those of two draws do."""
    if importlib.util.find_spec("scvi") is None:
        pytest.skip("scvi-tools is not installed")
    from anndata import AnnData
    from scvi.model import TOTALVI

    random = np.random.default_rng(0)
    n, codes = 400, np.repeat([0, 1], 200)
    level = np.where(random.random((n, 30)) < 0.3, 200.0, 5.0) * (1 + codes[:, None])
    y = random.poisson(level * random.lognormal(0, 0.3, (n, 30)))
    y[codes == 1, :3] = 0  # not measured there
    y[:5] = 0
    adata = AnnData(random.poisson(1.0, (n, 10)).astype("f4"))
    adata.obs["batch"] = codes.astype(str)
    adata.obsm["proteins"] = y
    TOTALVI.setup_anndata(adata, protein_expression_obsm_key="proteins", batch_key="batch")
    theirs = TOTALVI(adata, empirical_protein_background_prior=True).module
    for b in (0, 1):
        some = y[codes == b]
        draws = [
            background_prior(some[:, some.any(0)], np.random.default_rng(seed))
            for seed in range(20)
        ]
        means, sds = np.array(draws).T
        mean = theirs.background_pro_alpha[:, b].detach().numpy()
        sd = theirs.background_pro_log_beta[:, b].detach().exp().numpy()
        assert np.ptp(mean) == np.ptp(sd) == 0, "one number for all proteins of a batch"
        assert abs(mean[0] - means.mean()) < 4 * means.std()
        assert abs(sd[0] - sds.mean()) < 4 * sds.std()
        assert means.std() < 0.1
