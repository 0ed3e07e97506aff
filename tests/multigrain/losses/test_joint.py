"""The loss of a step and its gradients, against autograd of the written-out sum."""

import math

import pytest
import torch
from torch.nn import functional

from multigrain.config.training import MultiGrainSpec
from multigrain.losses import joint as module
from multigrain.losses.joint import JointLoss, Step
from multigrain.losses.triplets import sample_triplets
from multigrain.models.multigrain import MultiGrain

CLASSES = 4
INSTANCES = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 0, 0, 7])
STEP = Step(torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 0, 0, 2]), INSTANCES)
SEED = 3


def spec(mixup=0.0, **loss):
    """Bounds amid the distances below: terms above zero and not, negatives too far, rows without a near one."""
    loss = {"beta": 0.5, "margin": 0.1, "cutoff": 0.2, "nonzero_loss_cutoff": 0.52, "dimension": 6} | loss
    return MultiGrainSpec.model_validate({"loss": loss, "augment": {"mixup": mixup}})


def built(settings):
    torch.manual_seed(1)
    return JointLoss(MultiGrain("narrow", CLASSES), settings).double()


@pytest.fixture
def embeddings():
    """(11, 128), not negative, as after the pooling; copies of one image lie closer together, some more than others."""
    generator = torch.Generator().manual_seed(2)
    images, noise = (torch.rand(size, 128, dtype=torch.float64, generator=generator) for size in (10, 11))
    return images[INSTANCES] + torch.linspace(0.2, 2.2, 11, dtype=torch.float64)[:, None] * noise


def backward(made, embeddings, step=STEP, seed=SEED, scale=1.0):
    made.zero_grad()
    gradient, values = made.backward(embeddings, step, torch.Generator().manual_seed(seed), scale)
    return gradient, values, [None if weight.grad is None else weight.grad.clone() for weight in made.head]


def unit(x):
    return x / (x.norm(dim=1, keepdim=True) + 1e-6)


def triplets_of(settings, embeddings):
    loss = settings.loss
    generator = torch.Generator().manual_seed(SEED)
    found = sample_triplets(
        unit(embeddings), INSTANCES, loss.negatives, generator, loss.cutoff, loss.nonzero_loss_cutoff, loss.dimension
    )
    return list(zip(*(indices.tolist() for indices in found), strict=True))


def cross_entropy_by_loop(made, x):
    logits = x @ made.network.classifier.weight.T + made.network.classifier.bias
    return sum(row.exp().sum().log() - row[label] for row, label in zip(logits, STEP.labels, strict=True)) / len(x)


def margin_by_loop(made, settings, x, triplets):
    views, beta, margin = unit(x), made.margin.beta, settings.loss.margin
    total, counts = 0, {"active": 0, "triplets": 0, "pairs": 2 * len(triplets)}
    for anchor, positive, negative in triplets:
        d_ap, d_an = (((views[anchor] - views[other]) ** 2).sum().add(1e-8).sqrt() for other in (positive, negative))
        terms = [term for term in (d_ap - beta + margin, beta - d_an + margin) if term > 0]
        total = total + sum(terms)
        counts["active"] += len(terms)
        counts["triplets"] += bool(terms)
    return total / counts[settings.loss.normalise], counts


def entropy_by_loop(x):
    views, logs = unit(x), []
    for i, instance in enumerate(INSTANCES):
        squares = [((views[i] - views[j]) ** 2).sum() for j in range(len(views)) if INSTANCES[j] != instance]
        logs.append((min(squares) + 1e-8).sqrt().log())
    return -sum(logs) / len(logs)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("negatives", ["distance_weighted", "uniform", "reference"])
@pytest.mark.parametrize("entropy", [0.0, 0.7])
@pytest.mark.parametrize("normalise", ["active", "triplets", "pairs"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_written_out_sum(embeddings, weight, normalise, entropy, negatives):
    settings = spec(weight=weight, normalise=normalise, entropy=entropy, negatives=negatives)
    made = built(settings)
    gradient, values, head = backward(made, embeddings)
    x = embeddings.clone().requires_grad_()
    triplets = triplets_of(settings, embeddings)
    margin, counts = margin_by_loop(made, settings, x, triplets)
    assert 0 < counts["triplets"] < counts["active"] < counts["pairs"], "the counts tell the normalisations apart"
    class_term, spread = cross_entropy_by_loop(made, x), entropy_by_loop(x)
    loss = weight * class_term + (1 - weight) * margin + entropy * spread
    expected, *expected_head = gradients(loss, x, *made.head)
    assert_same(gradient, expected)
    if not weight:
        assert head[:2] == [None, None], "nothing to learn, and nothing to decay"
    for found, wanted in zip(head[0 if weight else 2 :], expected_head[0 if weight else 2 :], strict=True):
        assert_same(found, wanted)
    assert_same(values["loss"], loss.detach())
    assert_same(values["classification"], class_term.detach())
    assert_same(values["margin"], margin.detach())
    assert ("entropy" in values) == bool(entropy)
    if entropy:
        assert_same(values["entropy"], spread.detach())
    (first,) = gradients(weight * class_term, x)
    (rest,) = gradients((1 - weight) * margin + entropy * spread, x)
    share = first.norm() / (first.norm() + rest.norm())
    assert values["classification_gradient"].item() == pytest.approx(share.item(), rel=1e-9)
    if not entropy and weight in {0, 1}:
        assert share == weight


def test_sums_for_the_log_are_counted_one_by_one(embeddings):
    settings = spec()
    made = built(settings)
    _, values, _ = backward(made, embeddings)
    triplets, views = triplets_of(settings, embeddings), unit(embeddings).tolist()
    _, counts = margin_by_loop(made, settings, embeddings, triplets)
    alone = [
        all(math.dist(view, other) >= 0.52 for other, theirs in zip(views, INSTANCES, strict=True) if theirs != mine)
        for view, mine in zip(views, INSTANCES, strict=True)
    ]
    assert 0 < sum(alone) < 11
    assert {name: values[name].item() for name in ("triplets", "active", "anchors", "fallback")} == {
        "triplets": 6 + 6 + 2 + 2,
        "active": counts["active"],
        "anchors": 11,
        "fallback": sum(alone),
    }
    near = sum(math.dist(views[a], views[p]) for a, p, _ in triplets)
    far = sum(math.dist(views[a], views[n]) for a, _, n in triplets)
    assert [values["positive_distance"].item(), values["negative_distance"].item()] == pytest.approx([near, far])
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.parametrize(
    "instances", [torch.arange(11), torch.zeros(11, dtype=torch.int64)], ids=["m = 1", "one image"]
)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_without_pairs_only_the_class_is_learnt(embeddings, instances, weight):
    made = built(spec(weight=weight))
    gradient, values, head = backward(made, embeddings, Step(STEP.labels, instances))
    x = embeddings.clone().requires_grad_()
    assert_same(gradient, gradients(weight * cross_entropy_by_loop(made, x), x)[0])
    assert head[2] == 0
    assert values["margin"] == values["triplets"] == values["active"] == 0
    assert values["classification_gradient"] == (1 if weight else 0)


def test_scale_multiplies_gradients_and_nothing_else(embeddings):
    made = built(spec(entropy=0.5, mixup=0.4))
    gradient, values, head = backward(made, embeddings)
    for scale in (1024.0, torch.tensor(1024.0, dtype=torch.float64)):  # a power of two: exact
        scaled, same, scaled_head = backward(made, embeddings, scale=scale)
        assert same == values
        assert torch.equal(scaled, 1024 * gradient)
        assert all(torch.equal(found, 1024 * weight) for found, weight in zip(scaled_head, head, strict=True))


def test_gradients_add_up_in_the_head(embeddings):
    made = built(spec())
    _, _, head = backward(made, embeddings)
    made.backward(embeddings, STEP, torch.Generator().manual_seed(SEED))
    for weight, once in zip(made.head, head, strict=True):
        assert_same(weight.grad, 2 * once)


def test_mixup_leaves_the_margin_loss_alone(embeddings):
    plain, plain_values, plain_head = backward(built(spec(weight=0.0)), embeddings)
    found = {weight: backward(built(spec(weight=weight, mixup=0.4)), embeddings) for weight in (0.25, 0.5)}
    # Two mixes with one class term c: 2 (c / 4 + 3 m / 4) - (c / 2 + m / 2) = m.
    assert_same(2 * found[0.25][0] - found[0.5][0], plain)
    for weight, (_, values, head) in found.items():
        assert values["margin"] == plain_values["margin"]
        assert_same(head[2], (1 - weight) * plain_head[2])
        assert values["classification"] != plain_values["classification"]


def test_mixup_mixes_what_the_classifier_reads(embeddings, monkeypatch):
    drawn = []

    def recorded(logits, labels, order=None, share=1.0):
        drawn.append((order.tolist(), share))
        return classification_loss(logits, labels, order, share)

    classification_loss = module.classification_loss
    monkeypatch.setattr(module, "classification_loss", recorded)
    made = built(spec(weight=1.0, mixup=0.4))
    for seed in range(200):
        gradient, values, _ = backward(made, embeddings, seed=seed)
        order, share = drawn[-1]
        assert sorted(order) == list(range(11))
        assert 0 <= share <= 1
        if seed < 5:
            x = embeddings.clone().requires_grad_()
            logits = made.network.classifier(share * x + (1 - share) * x[order])
            losses = [functional.cross_entropy(logits, labels) for labels in (STEP.labels, STEP.labels[order])]
            loss = share * losses[0] + (1 - share) * losses[1]
            assert values["classification"].item() == pytest.approx(loss.item(), rel=1e-12)
            assert_same(gradient, gradients(loss, x)[0])
    assert backward(made, embeddings, seed=7)[1] == backward(made, embeddings, seed=7)[1]
    shares = torch.tensor([share for _, share in drawn[:200]])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)) = 0.139; four standard errors.
    assert shares.mean() == pytest.approx(0.5, abs=4 * math.sqrt(0.139 / 200))
    assert shares.var() == pytest.approx(0.139, abs=0.03)


def test_autocast_around_it_changes_nothing(embeddings):
    made = built(spec(entropy=0.5)).float()
    gradient, values, _ = backward(made, embeddings.float())
    with torch.autocast("cpu", torch.bfloat16):
        other, same, _ = backward(made, embeddings.float())
    assert gradient.dtype == other.dtype == torch.float32
    torch.testing.assert_close(same["classification"], values["classification"])
