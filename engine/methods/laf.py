"""LAF (Shen et al., "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", ICLR 2024): features of
forget samples move away from what a small autoencoder reconstructs, those of retain samples stay; no label is used.

s_i, u_j are the model's features of retain and of forget images, s_i0, u_j0 the original's. Two variational
autoencoders are fitted to the original's features, A_r to those of the retain set, A_f to those of the forget set, by
sum_d (A(z) - z)_d^2 + 0.025 KL(posterior || N(0, 1)). With m = mean_d (A(z) - z)_d^2 and E = exp(m / (m + 1)),

    extraction   mean_i E(A_r; s_i) - mean_j E(A_f; u_j)
    alignment    mean_i (1 - cos(s_i, s_i0)) - log mean_j exp((1 - cos(u_j, u_j0)) / t)

is minimised. The second line is the paper's sum_i log[exp(1 - cos_i) / sum_j exp((1 - cos_j) / t)], per sample and
without its constant. If labels may be used, a repair by cross-entropy on the retain set follows (the paper's LAF+R).

Departures:
- The paper takes a step on each line in turn, each with its own Adam and rate. Here both are one loss, the second
  weighted by `alignment`, in one AdamW step.
- The autoencoders return the mean of their posterior, not a draw. They end in a linear layer, not a sigmoid, since a
  ViT's features are signed. m is a mean over features, not a sum, which saturates E for wide ones.
- The repair trains all weights, not the head alone.
- On several ranks, or with accumulation, the logarithm is taken over each micro-batch.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.data.samples import evenly_spaced
from engine.methods.common.distillation import Distillation
from engine.methods.finetune import RETAIN_LR_PER_WIDTH
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

# Learning rate of the forget phase times the width of the model.
FORGET_LR_PER_WIDTH = 3.84e-3
# As published: batch size and rate of the autoencoders, and the weight of their prior.
_BATCH, _LR, _PRIOR = 128, 1e-3, 0.025


@dataclasses.dataclass(frozen=True, kw_only=True)
class LafConfig:
    """Options of LAF.

    Attributes:
        forget_epochs: Passes over the forget set; each step takes as many retain samples as forget samples.
        forget_lr: Constant learning rate of those steps; null: 3.84e-3 / width.
        alignment: Weight of the alignment loss.
        temperature: t in the alignment loss.
        vae_epochs: Passes over the features by which each autoencoder is fitted.
        latent: Latent dimensions of an autoencoder.
        vae_samples: Most retain samples that A_r is fitted to.
        repair_epochs: Passes over the retain set by cross-entropy afterwards; 0 uses no labels at all.
        lr: Peak learning rate of the repair; null: 0.192 / width.
    """

    forget_epochs: float = tunable(5.0, Range(1, 10, step=1))
    forget_lr: float | None = tunable(None, rate(FORGET_LR_PER_WIDTH))
    alignment: float = 1.0
    temperature: float = 20.0
    vae_epochs: int = 10
    latent: int = 16
    vae_samples: int = 10_000
    repair_epochs: float = 0.0
    lr: float | None = None

    def __post_init__(self) -> None:
        require(self.forget_epochs > 0, "forget_epochs", self.forget_epochs, "above 0")
        positive_or_null(self, "forget_lr")
        require(self.alignment >= 0, "alignment", self.alignment, "0 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.vae_epochs >= 1, "vae_epochs", self.vae_epochs, "at least 1")
        require(self.latent >= 1, "latent", self.latent, "at least 1")
        require(self.vae_samples >= 1, "vae_samples", self.vae_samples, "at least 1")
        require(self.repair_epochs >= 0, "repair_epochs", self.repair_epochs, "0 or more")
        positive_or_null(self, "lr")


class Autoencoder(nn.Module):
    """A variational autoencoder of features [B, width], with the paper's layers of 128 and 32 units.

    Args:
        width: Number of features.
        latent: Number of latent dimensions.
    """

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.posterior = nn.Linear(32, 2 * latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the features [B, width] that the mean of their posterior is decoded to."""
        return self.decoder(self.posterior(self.encoder(features)).chunk(2, 1)[0])

    def objective(self, features: Tensor) -> Tensor:
        """Return the negative evidence bound, a mean over the batch; draws from the posterior."""
        mean, log_variance = self.posterior(self.encoder(features)).chunk(2, 1)
        drawn = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        prior = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return ((self.decoder(drawn) - features) ** 2).sum(1).mean() + _PRIOR * prior.mean()


def fitted(features: Tensor, latent: int, epochs: int, seed: int) -> Autoencoder:
    """Return a frozen autoencoder fitted to features; the global random generators stay as they are.

    Args:
        features: Features [n, width].
        latent: Number of latent dimensions.
        epochs: Passes over the features.
        seed: Seed of the initial weights, of the order and of the draws.
    """
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(features.shape[1], latent).to(features.device)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=_LR)
        for _ in range(epochs):
            for rows in torch.randperm(len(features)).split(_BATCH):
                optimizer.zero_grad()
                autoencoder.objective(features[rows.to(features.device)]).backward()
                optimizer.step()
    return autoencoder.requires_grad_(False).eval()


def extraction(autoencoder: Autoencoder, features: Tensor) -> Tensor:
    """Return E [B] of features [B, width], between 1 (perfect reconstruction) and e."""
    error = ((autoencoder(features) - features) ** 2).mean(1)
    return torch.exp(error / (error + 1))


@register
class Laf(Distillation):
    name = "laf"
    summary = "LAF: features of forget samples away from what an autoencoder reconstructs, without labels"
    Config = LafConfig
    needs = frozenset({"logits", "features"})

    def __init__(self, config: LafConfig, context: Context) -> None:
        super().__init__(config, context)
        self._autoencoders: dict[str, Autoencoder] = {}

    def phases(self) -> list[Phase]:
        config = self.config
        forget = Phase(
            name="forget",
            samples="forget",
            epochs=config.forget_epochs,
            lr=self.learning_rate(config.forget_lr, FORGET_LR_PER_WIDTH),
            schedule="constant",
            augment=False,
            guarded=True,
            paired="retain",
        )
        repair = Phase(
            name="retain",
            samples="retain",
            epochs=config.repair_epochs,
            lr=self.learning_rate(config.lr, RETAIN_LR_PER_WIDTH),
        )
        return [phase for phase in (forget, repair) if phase.epochs > 0]

    def uses_teachers(self, phase: Phase) -> bool:
        return phase.name == "forget"

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return phase.name == "forget"  # for the paired retain samples, few of which occur twice

    def teacher_forward(self, batch: Batch, phase: Phase) -> Tensor:
        return outputs(self.context.original, batch.images, "features")

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        found = super().passes(phases, number, taken)
        if phases[number].name == "forget":  # outputs for the paired retain samples are computed in each step
            fitted = min(self.config.vae_samples, len(self.context.retain))
            found.append(ExtraPasses(name="teacher outputs", images=fitted + taken.paired))
        return found

    def prepare(self, phase: Phase) -> None:
        super().prepare(phase)
        if phase.name != "forget":
            return
        context, config = self.context, self.config
        some = evenly_spaced(context.retain, config.vae_samples, "for the autoencoder")
        (forgotten,) = self._cache["forget"]
        (retained,) = context.loader(some, "none").rows(lambda batch: self.run_teachers(batch, phase))
        for which, features in (("forget", forgotten), ("retain", retained)):
            self._autoencoders[which] = fitted(
                features.to(context.device), config.latent, config.vae_epochs, context.run.seed
            )

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        weights = {
            f"{which}.{name}": value.cpu()
            for which, autoencoder in self._autoencoders.items()
            for name, value in autoencoder.state_dict().items()
        }
        return {**super().cache_state(phase), **weights} if phase.name == "forget" else {}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        super().load_cache_state(phase, prepared)
        for which in ("forget", "retain") if phase.name == "forget" else ():
            weights = {
                name.removeprefix(f"{which}."): value for name, value in prepared.items() if name.startswith(which)
            }
            autoencoder = Autoencoder(self.context.info.width, self.config.latent)
            autoencoder.load_state_dict(weights)
            self._autoencoders[which] = autoencoder.to(self.context.device).requires_grad_(False).eval()

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        if phase.name == "retain":
            return {"retain_ce": cross_entropy(model, batch)}
        features = outputs(model, batch.images, "features").float()
        away = 1 - F.cosine_similarity(features, self.teacher(batch, phase))
        t = self.config.temperature
        return {
            "forget_extraction": -extraction(self._autoencoders["forget"], features).mean(),
            "forget_alignment": -self.config.alignment * ((away / t).exp().mean().log()),
        }

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        features = outputs(model, batch.images, "features").float()
        (original,) = self.run_teachers(batch, phase)
        away = 1 - F.cosine_similarity(features, original)
        return {
            "retain_extraction": extraction(self._autoencoders["retain"], features).mean(),
            "retain_alignment": self.config.alignment * away.mean(),
        }
