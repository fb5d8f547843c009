"""ACVAE: each term by hand, where gradients go, what the critic of the prior converges to, noise in training only, what it learns."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from onerec_hf.baselines import SequentialConfig, SequentialRecommender
from onerec_hf.baselines.acvae import PriorCritic
from onerec_hf.baselines.next_items import pad_left


def make(**config) -> SequentialRecommender:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "latent_size": 3, "max_history": 6, "dropout_rate": 0.0, "initializer_range": 0.5}
    return SequentialRecommender.from_items(range(12), architecture="acvae", **{**settings, **config})


LENGTHS = (4, 2, 3)


def inputs():
    """Embeddings and latents of three histories, padding (which must not count) last."""
    torch.manual_seed(1)
    x, z = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 3, requires_grad=True)
    return x, z, torch.tensor(LENGTHS).unsqueeze(1)


def t_by_hand(critic, x, z):
    states = critic.read.weight @ torch.cat([x, z]) + critic.read.bias
    for first, second in critic.layers:
        states = states + second.weight @ (first.weight @ states + first.bias) + second.bias
        states = torch.where(states > 0, states, states.exp() - 1)
    return critic.out.weight @ states + critic.out.bias + z**2 / 2


def test_the_adversarial_kl_is_the_mean_of_the_critic_which_it_does_not_train():
    encoder, (x, z, lengths) = make().encoder, inputs()
    kl = encoder.terms(x, z, lengths).kl
    values = [t_by_hand(encoder.prior_critic, x[u, i], z[u, i]) for u in range(3) for i in range(LENGTHS[u])]
    torch.testing.assert_close(kl, torch.stack(values).mean(), rtol=1e-5, atol=1e-6)
    kl.backward()
    assert all(weight.grad is None for weight in encoder.parameters())
    assert z.grad is not None
    assert (z.grad[0] != 0).all()
    assert (z.grad[1, 2:] == 0).all()  # padding


def test_the_critic_tells_inferred_from_drawn_latents_and_trains_nothing_else():
    encoder, (x, z, lengths) = make().encoder, inputs()
    torch.manual_seed(2)
    found = encoder.terms(x, z, lengths).critic
    torch.manual_seed(2)
    drawn, expected = torch.randn(3, 4, 3), []
    for u in range(3):
        for i in range(LENGTHS[u]):
            inferred, prior = (t_by_hand(encoder.prior_critic, x[u, i], of[u, i]) for of in (z, drawn))
            expected.append(-(1 / (1 + (-inferred).exp())).log() - (1 - 1 / (1 + (-prior).exp())).log())
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    found.backward()
    assert x.grad is None
    assert z.grad is None
    trained = {name for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith("prior_critic")}


def test_the_contrast_is_between_a_history_and_latents_of_another():
    encoder, (x, z, lengths) = make().encoder, inputs()
    found = encoder.terms(x, z, lengths).contrast
    own, other = [], []
    for u in range(3):
        before = (u - 1) % 3  # whose latents are put in the place of this one's
        both = min(LENGTHS[u], LENGTHS[before])
        own += encoder.pair_critic(x[u : u + 1, : LENGTHS[u]], z[u : u + 1, : LENGTHS[u]])[0].tolist()
        other += encoder.pair_critic(x[u : u + 1, :both], z[before : before + 1, :both])[0].tolist()
    expected = np.mean([math.log1p(math.exp(-s)) for s in own]) + np.mean([math.log1p(math.exp(s)) for s in other])
    assert math.isclose(float(found.detach()), expected, rel_tol=1e-5)
    found.backward()
    assert z.grad is not None
    assert (z.grad[0] != 0).any()


def test_the_loss_of_training_is_the_weighted_sum():
    model = make(kl_weight=0.05, contrast_weight=0.1).train()
    ids, labels = pad_left([np.array([3, 1, 4]), np.array([5, 9])]), torch.tensor([[2, 5, 9], [-100, 10, 1]])
    torch.manual_seed(3)
    output = model(ids, labels=labels)
    torch.manual_seed(3)
    x = model.encoder.norm(model.embed(torch.tensor([[4, 2, 5], [6, 10, 0]])))
    z = model.encoder.infer(x)
    terms = model.encoder.terms(x, z, torch.tensor([[3], [2]]))
    real = labels != -100
    entropy = F.cross_entropy(output.last_hidden_state[real] @ model.item_vectors().T, labels[real] - 1)
    torch.testing.assert_close(output.loss, entropy + 0.05 * terms.kl + terms.critic + 0.1 * terms.contrast)
    last = (model.encoder.decoder.weight @ z[1, 1] + model.encoder.decoder.bias).tanh()
    torch.testing.assert_close(output.last_hidden_state[1, -1], last)


def test_the_critic_at_its_optimum_gives_the_divergence_from_the_prior():
    """For z of N(m, 1) the mean of log q(z) - log p(z) is |m|^2 / 2; each output sees all of z, so each estimates all of it."""
    torch.manual_seed(0)
    critic = PriorCritic(SequentialConfig(architecture="acvae", hidden_size=16, latent_size=2))
    optimizer, means, x = torch.optim.Adam(critic.parameters(), 1e-2), torch.tensor([1.0, -0.5]), torch.zeros(512, 16)
    for _ in range(400):
        inferred, drawn = critic(x, means + torch.randn(512, 2)), critic(x, torch.randn(512, 2))
        loss = -(F.logsigmoid(inferred) + F.logsigmoid(-drawn)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = critic(torch.zeros(20_000, 16), means + torch.randn(20_000, 2)).mean(0).detach()
    divergence = means.square().sum() / 2
    torch.testing.assert_close(found, divergence.expand(2), rtol=0, atol=0.12)


def test_noise_is_drawn_in_training_only():
    model, ids = make(), pad_left([np.array([3, 1, 4])])
    model.eval()
    assert torch.equal(model.encode(ids), model.encode(ids))
    labels = torch.tensor([[2, 5, 9]])
    assert model(ids, labels=labels).loss == model(ids, labels=labels).loss
    model.train()
    assert not torch.equal(model.encode(ids), model.encode(ids))
    # The noise has mean zero: over many draws the recurrent states stay where they are.
    states = torch.zeros(4000, 1, 16)
    noisy = model.encoder._noisy(states)
    assert noisy.std() > 0.1
    assert noisy.mean(0).abs().max() < 5 * noisy.std() / 4000**0.5


def test_training_learns_the_next_item():
    model, rows = make(hidden_size=16, latent_size=8, max_history=4), list(range(8))
    ids = pad_left([np.arange(start, start + 4) for start in rows])
    labels = pad_left([np.arange(start + 1, start + 5) for start in rows])
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-2), model.eval()(ids, labels=labels).loss
    for _ in range(150):
        optimizer.zero_grad()
        model.train()(ids, labels=labels).loss.backward()
        optimizer.step()
    assert model.eval()(ids, labels=labels).loss < before / 5
    assert model.rank([np.arange(start, start + 4) for start in (0, 3, 7)], 1)[:, 0].tolist() == [4, 7, 11]
