"""A layer's place in the picture of a model, read from its module path alone."""

from __future__ import annotations

import pytest

from rankwise.report.grid import (
    GridPosition,
    grid_position,
    ink_on,
    kind_order,
    rank_colour,
    rank_grids,
    short_kinds,
)
from rankwise.run.summary import LayerRank

WHISPER = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.mark.parametrize(
    ("path", "stack", "layer", "kind"),
    [
        ("bert.encoder.layer.11.attention.self.query", "bert.encoder.layer", 11, "attention.self.query"),
        ("encoder.layer.3.attention.output.dense", "encoder.layer", 3, "attention.output.dense"),
        ("bert.pooler.dense", "", None, "bert.pooler.dense"),
        ("model.layers.31.self_attn.q_proj", "model.layers", 31, "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.3.w1", "model.layers", 0, "mlp.experts.3.w1"),
        ("lm_head", "", None, "lm_head"),
        ("model.encoder.layers.2.fc1", "model.encoder.layers", 2, "fc1"),
        ("model.decoder.layers.2.encoder_attn.k_proj", "model.decoder.layers", 2, "encoder_attn.k_proj"),
        ("transformer.h.5.attn.c_attn", "transformer.h", 5, "attn.c_attn"),
        ("encoder.block.4.layer.0.SelfAttention.q", "encoder.block", 4, "SelfAttention.q"),
        ("decoder.block.4.layer.2.DenseReluDense.wi", "decoder.block", 4, "DenseReluDense.wi"),
        (
            "vit.encoder.layer.7.attention.attention.query",
            "vit.encoder.layer",
            7,
            "attention.attention.query",
        ),
        ("vit.layers.7.attention.q_proj", "vit.layers", 7, "attention.q_proj"),
        (
            "swin.encoder.layers.2.blocks.5.attention.q_proj",
            "swin.encoder.layers.2.blocks",
            5,
            "attention.q_proj",
        ),
        (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
            "down_blocks.0.attentions.1.transformer_blocks",
            0,
            "attn1.to_out.0",
        ),
        ("fc1", "", None, "fc1"),
        ("head.proj", "", None, "head.proj"),
        ("net.2", "net", 2, "net"),
        ("2", "", 2, "layer"),
        ("", "", None, ""),
    ],
)
def test_positions(path: str, stack: str, layer: int | None, kind: str) -> None:
    assert grid_position(path) == GridPosition(stack, layer, kind)


def layers(*paths: str) -> list[LayerRank]:
    return [LayerRank(path, 4, 8, 0.0, 64) for path in paths]


def test_every_layer_has_one_cell() -> None:
    paths = [f"model.encoder.layers.{n}.self_attn.{kind}" for n in range(12) for kind in WHISPER]
    paths += [f"model.decoder.layers.{n}.encoder_attn.{kind}" for n in range(12) for kind in WHISPER]
    paths += ["proj_out", "model.embed"]
    grids = rank_grids(layers(*paths))
    assert [grid.title for grid in grids] == ["model.encoder.layers", "model.decoder.layers", "other layers"]
    assert sorted(layer.path for grid in grids for layer in grid.cells.values()) == sorted(paths)
    assert grids[0].rows == [str(n) for n in range(12)]
    assert grids[0].columns == [f"self_attn.{kind}" for kind in WHISPER]
    assert grids[2].rows == ["proj_out", "model.embed"]
    assert grids[2].loose


def test_blocks_in_stages_make_one_grid() -> None:
    paths = [f"swin.layers.{stage}.blocks.{n}.attention.q_proj" for stage in (1, 0) for n in (0, 1)]
    [grid] = rank_grids(layers(*paths))
    assert grid.title == "swin.layers.*.blocks"
    assert grid.rows == ["0.0", "0.1", "1.0", "1.1"]


def test_a_hole_in_the_model_is_a_hole_in_the_grid() -> None:
    [grid] = rank_grids(layers("h.0.q", "h.1.q", "h.1.v"))
    assert set(grid.cells) == {(0, 0), (1, 0), (1, 1)}


def test_a_model_without_numbers_is_a_list() -> None:
    [grid] = rank_grids(layers("fc1", "fc2"))
    assert (grid.title, grid.rows, grid.loose) == ("layers", ["fc1", "fc2"], True)


@pytest.mark.parametrize(
    "kinds",
    [
        ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense"],
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj"],
        [*(f"self_attn.{kind}" for kind in WHISPER), *(f"encoder_attn.{kind}" for kind in WHISPER), "fc1", "fc2"],
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["SelfAttention.q", "SelfAttention.o", "EncDecAttention.q", "EncDecAttention.o", "DenseReluDense.wi",
         "DenseReluDense.wo"],
    ],
)  # fmt: skip
def test_kinds_go_in_the_order_in_which_data_flows(kinds: list[str]) -> None:
    mixed = kinds[::-1]
    assert sorted(mixed, key=kind_order) == kinds


def test_short_kinds_stay_distinct() -> None:
    kinds = ["attn.c_proj", "mlp.c_proj", "attn.c_attn", "mlp.c_fc", "x.dense", "y.x.dense", "x"]
    assert len(set(short_kinds(kinds))) == len(kinds)
    assert short_kinds(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]) == ["attn.c_proj", "mlp.c_proj", "c_fc"]


@pytest.mark.parametrize("largest", [1, 2, 8, 12, 64])
def test_colours_grow_lighter_with_rank_and_numbers_stay_legible(largest: int) -> None:
    def light(colour: tuple[int, int, int]) -> float:
        parts = [
            (p / 255 / 12.92) if p / 255 <= 0.04045 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in colour
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    lights = [light(rank_colour(rank, largest)) for rank in range(1, largest + 1)]
    assert lights == sorted(lights)
    for rank in range(1, largest + 1):
        colour = rank_colour(rank, largest)
        ink = 0.0 if ink_on(colour) == "black" else 1.0
        low, high = sorted((ink, light(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
