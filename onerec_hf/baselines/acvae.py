"""
The network of ACVAE (Xie et al., arXiv 2103.10693): a variational autoencoder over the positions of a history. A recurrent layer and a causal
convolution with injected noise give a latent z per position, from which the next item is decoded. In training three terms join the
reconstruction loss:

- adversarial KL: the mean of a critic T(x, z), which stands for log q(z|x) - log p(z) (adversarial variational Bayes),
- the critic's own loss: T tells inferred z from draws of the prior N(0, 1); its gradient reaches T only,
- contrastive: a second critic S(x, z) tells a history's own z from another history's, a lower bound of their mutual information.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from onerec_hf.baselines.configuration_sequential import SequentialConfig
from onerec_hf.baselines.sequential_encoders import roll

_REACH = 5  # positions that the convolution reads, as in the authors' code


class ACVAETerms(NamedTuple):
    """What is added to the reconstruction loss, unweighted; each a mean over positions (and, for the first two, latent dimensions)."""

    kl: torch.Tensor
    critic: torch.Tensor
    contrast: torch.Tensor


class PriorCritic(nn.Module):
    """T(x, z), (..., latent_size): each output reads all of z and estimates the whole log ratio, with one dimension's `z ** 2 / 2` of the prior added."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        assert config.latent_size is not None  # the config fills it in
        width = config.hidden_size
        self.read = nn.Linear(width + config.latent_size, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(2))
        self.out = nn.Linear(width, config.latent_size)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        states = self.read(torch.cat([x, z], dim=-1))
        for layer in self.layers:
            states = F.elu(states + layer(states))
        return self.out(states) + 0.5 * z.square()


class PairCritic(nn.Module):
    """S(x, z), one value per position: how well the latents up to it belong to the items up to it."""

    def __init__(self, config: SequentialConfig):
        super().__init__()
        assert config.latent_size is not None  # the config fills it in
        self.gru = nn.GRU(config.hidden_size + config.latent_size, config.hidden_size, batch_first=True)
        self.out = nn.Linear(config.hidden_size, 1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.gru(torch.cat([x, z], dim=-1))[0])).squeeze(-1)


class ACVAEEncoder(nn.Module):
    """
    Item embeddings to states, by way of z. Outside training the noise has its mean, zero, so that a history has one z.

    The authors' code has an output layer over items beside embeddings of unit variance, and one optimiser for each player. Here items are scored by
    the vectors that they are read by, as in the other models, so that these are small: a layer norm brings them to unit variance. The critic of the
    prior has no dropout. One optimiser takes gradients that are cut where the players part.
    """

    def __init__(self, config: SequentialConfig):
        super().__init__()
        assert config.intermediate_size is not None  # the config fills these in
        assert config.num_hidden_layers is not None
        assert config.latent_size is not None
        width = config.intermediate_size
        self.kl_weight, self.contrast_weight = config.kl_weight, config.contrast_weight
        self.norm, self.dropout = nn.LayerNorm(config.hidden_size), nn.Dropout(config.dropout_rate)
        self.gru = nn.GRU(config.hidden_size, width, config.num_hidden_layers, batch_first=True)
        self.noise = nn.Linear(width, width, bias=False)  # without a bias tanh keeps the noise's mean at zero
        self.before = nn.Linear(width, width)
        self.convolution = nn.Conv1d(width, 2 * width, _REACH)
        self.after = nn.Linear(2 * width, width)
        self.to_latent = nn.Linear(width, config.latent_size)
        self.decoder = nn.Linear(config.latent_size, config.hidden_size)
        self.prior_critic, self.pair_critic = PriorCritic(config), PairCritic(config)

    def _noisy(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.noise(torch.randn_like(states)).tanh() if self.training else states

    def infer(self, x: torch.Tensor) -> torch.Tensor:
        """(users, t, hidden_size) embeddings, padding last, to (users, t, latent_size) z, each of its position and those before it."""
        global_states = self.gru(self.dropout(x))[0]
        local = F.softplus(self.before(self._noisy(global_states)))
        local = self.convolution(F.pad(self._noisy(local).mT, (_REACH - 1, 0))).mT
        local = F.softplus(self.after(F.softplus(local)))
        return self.to_latent(self.dropout(global_states + local))

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        lengths = real.sum(1, keepdim=True)
        z = self.infer(roll(self.norm(states), lengths))
        return roll(self.decoder(z).tanh(), -lengths)

    def with_loss(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of `forward`, and what is added to the reconstruction loss."""
        lengths = real.sum(1, keepdim=True)
        x = roll(self.norm(states), lengths)
        z = self.infer(x)
        terms = self.terms(x, z, lengths)
        added = self.kl_weight * terms.kl + terms.critic + self.contrast_weight * terms.contrast
        return roll(self.decoder(z).tanh(), -lengths), added

    def terms(self, x: torch.Tensor, z: torch.Tensor, lengths: torch.Tensor) -> ACVAETerms:
        """
        Args:
            x: (users, t, hidden_size) embeddings, padding last.
            z: (users, t, latent_size).
            lengths: (users, 1) items of each history.
        """
        real = torch.arange(x.shape[1], device=x.device) < lengths
        fixed = {name: weight.detach() for name, weight in self.prior_critic.named_parameters()}
        kl = functional_call(self.prior_critic, fixed, (x, z))[real].mean()
        inferred = self.prior_critic(x.detach(), z.detach())[real]
        drawn = self.prior_critic(x.detach(), torch.randn_like(z))[real]
        critic = -(F.logsigmoid(inferred) + F.logsigmoid(-drawn)).mean()
        # z of the neighbour in the batch, where both histories have an item: S would tell padding at once.
        other, both = z.roll(1, dims=0), real & real.roll(1, dims=0)
        own = F.softplus(-self.pair_critic(x, z)[real]).mean()
        return ACVAETerms(kl, critic, own + F.softplus(self.pair_critic(x, other)[both]).mean())
