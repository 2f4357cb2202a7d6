"""find_scale_invariant on layers wired together: residuals, concatenation, attention, shared weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retract.nets import find_scale_invariant
from tests.nets.arrangements import Net, images, kinds


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_densenet_concatenation_and_several_consumers():
    def forward(m, x):
        a = m["a"](x)
        b = m["b"](F.relu(m["norm_a"](a)))
        both = torch.cat([a, b], 1)
        return m["out"](torch.tanh(m["norm_1"](both)).mean((2, 3))) + m["out"](m["norm_2"](both).amax((2, 3)))

    model = Net(
        forward,
        a=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        b=nn.Conv2d(4, 2, 3, padding=1, bias=False),
        norm_a=nn.BatchNorm2d(4),
        norm_1=nn.BatchNorm2d(6),
        norm_2=nn.BatchNorm2d(6),
        out=nn.Linear(6, 3),
    )
    found = kinds(model, images())
    assert found["layers.a.weight"] == found["layers.b.weight"] == "filter"
    assert found["layers.out.weight"] == "none"


def residual_net(forward):
    return Net(
        forward,
        stem=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(4),
        a=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(4),
        b=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(4),
        out=nn.Linear(4, 3),
    )


def test_preactivation_residual_keeps_only_the_first_convolution():
    def forward(m, x):
        x = m["stem"](x)
        x = x + m["b"](F.relu(m["bn2"](m["a"](F.relu(m["bn1"](x))))))
        return m["out"](F.relu(m["bn3"](x)).mean((2, 3)))

    found = find_scale_invariant(residual_net(forward), images())
    assert found["layers.a.weight"].kind == "filter"
    for name in ("stem", "b"):
        assert found[f"layers.{name}.weight"].kind == "none"
        assert found[f"layers.{name}.weight"].residual > 1e-3


def test_postactivation_residual_keeps_all_even_with_zero_initialised_gain():
    def forward(m, x):
        x = F.relu(m["bn1"](m["stem"](x)))
        x = F.relu(x + m["bn3"](m["b"](F.relu(m["bn2"](m["a"](x))))))
        return m["out"](x.mean((2, 3)))

    model = residual_net(forward)
    nn.init.zeros_(model.layers["bn3"].weight)
    found = kinds(model, images())
    assert [found[f"layers.{n}.weight"] for n in ("stem", "a", "b")] == ["filter"] * 3


def test_raw_skip_consumer_spoils_invariance():
    model = Net(
        lambda m, x: m["out"]((m["bn"](y := m["conv"](x)) + y).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 3, bias=False),
        bn=nn.BatchNorm2d(4),
        out=nn.Linear(4, 3),
    )
    assert find_scale_invariant(model, images())["layers.conv.weight"].residual > 1e-3


def test_two_layers_that_share_a_layer_norm_are_not_invariant_one_by_one():
    model = Net(
        lambda m, x: m["out"](m["norm"](torch.cat([m["a"](x), m["b"](x)], 1))),
        a=nn.Linear(4, 3, bias=False),
        b=nn.Linear(4, 3, bias=False),
        norm=nn.LayerNorm(6),
        out=nn.Linear(6, 3),
    )
    found = kinds(model, torch.randn(7, 4))
    assert found["layers.a.weight"] == found["layers.b.weight"] == "none"


def test_shared_weights_are_one_entry_and_need_every_use_to_be_normalised():
    def net(second_use_normalised):
        def forward(m, x):
            y = torch.tanh(m["bn1"](m["a"](x)))
            z = m["b"](y)
            return m["out"](m["bn2"](z) if second_use_normalised else z)

        a = nn.Linear(4, 4, bias=False)
        b = nn.Linear(4, 4, bias=False)
        b.weight = a.weight
        return Net(forward, a=a, b=b, bn1=nn.BatchNorm1d(4), bn2=nn.BatchNorm1d(4), out=nn.Linear(4, 3))

    x = torch.randn(7, 4)
    assert "layers.b.weight" not in kinds(net(True), x)
    assert kinds(net(True), x)["layers.a.weight"] == "filter"
    assert kinds(net(False), x)["layers.a.weight"] == "none"


def test_attention_with_normalised_queries_and_keys():
    heads, width = 2, 8

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.norm = nn.LayerNorm(width // heads)
            self.out = nn.Linear(width, 3)

        def forward(self, x):
            q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))

    found = find_scale_invariant(Attention(), torch.randn(3, 5, width))
    assert str(found["q.weight"].manifold) == str(found["k.weight"].manifold) == "PSI(dim=0, groups=2)"
    assert found["q.weight"].kind == "group"
    assert [found[f"{n}.weight"].kind for n in "vo"] == ["none", "none"]


def test_transformer_layer_has_nothing_on_a_manifold():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
    assert not [n for n, i in find_scale_invariant(layer, torch.randn(3, 5, 8)).items() if i.manifold is not None]


def test_plain_multihead_attention_has_nothing_invariant():
    model = Net(
        lambda m, x: m["attention"](x, x, x)[0],
        attention=nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
    )
    assert set(kinds(model, torch.randn(3, 5, 8)).values()) == {"none"}


def test_embedding_before_layer_norm_is_invariant_per_row_also_for_rows_the_batch_leaves_out():
    model = Net(
        lambda m, t: m["out"](m["norm"](m["table"](t))),
        table=nn.Embedding(10, 6, sparse=True),
        norm=nn.LayerNorm(6),
        out=nn.Linear(6, 3),
    )
    found = kinds(model, torch.randint(0, 5, (3, 4)))
    assert found["layers.table.weight"] == "filter"


def test_weight_used_as_x_times_w_is_invariant_along_its_columns():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))
            self.bn, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.bn(x @ self.w))

    assert str(find_scale_invariant(Columns(), torch.randn(7, 4))["w"].manifold) == "PSI(dim=1)"
