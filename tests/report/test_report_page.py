"""The page of `rankwise report`: complete, self-contained, correct, and interactive in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("jinja2")

from typer.testing import CliRunner

import rankwise as rw
from browser import chromium
from expert_world import EXPERTS, some_tokens, tiny_moe
from rankwise.report import figures
from rankwise.report.grid import rank_colour
from rankwise.report.html import render_report, write_report
from rankwise.report.spectra import update_spectra
from rankwise.run.history import RankHistory
from recipe_world import save_tiny_model, write_recipe, write_table
from tiny import llama


def call(*words: object) -> tuple[int, str, str]:
    from rankwise.cli import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `rankwise train` writes, with a checkpoint in it."""
    world = tmp_path_factory.mktemp("trained")
    write_table(world / "reviews.csv")
    model = save_tiny_model(world / "model")
    code, _, err = call("train", write_recipe(world, model, training__save_steps=5, training__eval_steps=5))
    assert code == 0, err
    return world / "out"


@pytest.fixture(scope="module")
def page(trained: Path) -> str:
    return render_report([trained])


def data_of(page: str) -> Any:
    """The data packed into the page, with the ranks at every step as the page's script restores them."""
    [packed] = re.findall(r'<script type="application/gzip" id="data">(.*?)</script>', page)
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    for frame in data["frames"]:
        frame["ranks"] = [frame["first"]]
        for changes in frame["changes"]:
            ranks = dict(enumerate(frame["ranks"][-1])) | dict(zip(changes[::2], changes[1::2], strict=True))
            frame["ranks"].append(list(ranks.values()))
    return data


def test_the_page_is_small_and_asks_nothing_of_a_network(page: str) -> None:
    assert len(page.encode()) < 2_000_000
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page.partition('id="data"')[0])


def test_the_slider_goes_through_the_ranks_of_the_history(page: str, trained: Path) -> None:
    history = RankHistory.load(trained / "rank_history.json")
    [frame] = data_of(page)["frames"]
    records = [
        *history.records,
        history.records[-1],
    ]  # the ranks after the last allocation apply until the end of the run
    assert frame["steps"] == [*(record.step for record in history.records), 10]
    assert frame["budgets"] == [record.budget for record in records]
    for ranks, record in zip(frame["ranks"], records, strict=True):
        assert ranks == record.ranks
    cells = [cell for rows in frame["cells"].values() for row in rows for cell in row]
    assert sorted(cells) == list(range(len(history.layers)))


def test_everything_in_the_charts_is_in_tables(page: str, trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    for layer in results["ranks"]["layers"]:
        assert re.search(rf"{re.escape(layer['path'])}</th><td>{layer['rank']}</td>", page)
    for values in update_spectra(trained).values():
        assert ", ".join(f"{value:.3g}" for value in values) in page
    for key in ("accuracy", "macro_f1"):
        assert f"{results['after'][key]:.4g}" in page
    assert "target_modules" in page  # the recipe is there, too
    losses = [entry["loss"] for entry in results["log"] if "loss" in entry]
    assert all(f"<td>{loss:.4g}</td>" in page for loss in losses)


def test_losses_and_held_out_losses_are_drawn(page: str, trained: Path) -> None:
    log = json.loads((trained / "results.json").read_text())["log"]
    drawn = {trace["name"]: trace for trace in data_of(page)["figures"]["loss"]["data"]}
    assert drawn["training"]["y"] == [entry["loss"] for entry in log if "loss" in entry]
    assert drawn["held out"]["x"] == [5, 10]


def test_a_checkpoint_has_its_run_s_recipe_and_log(trained: Path) -> None:
    page = render_report([trained / "checkpoint-5"])
    assert "target_modules" in page
    assert data_of(page)["figures"]["loss"]["data"][0]["x"] == [1, 2, 3, 4, 5]


def test_several_runs_stand_side_by_side(trained: Path) -> None:
    page = render_report([trained, trained / "checkpoint-5"])
    data = data_of(page)
    assert len(data["frames"]) == 2
    assert {trace["name"] for trace in data["figures"]["parameters"]["data"]} == {"out", "checkpoint-5"}
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
def test_a_folder_that_peft_wrote_is_reported(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fields = {"init_r": 4, "target_r": 2, "total_step": 10} if kind == "AdaLoraConfig" else {"r": 4}
    config = getattr(peft, kind)(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **fields)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    code, out, err = call("report", tmp_path / "adapter", "-o", tmp_path / "page.html")
    assert (code, err) == (0, ""), err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "model.layers.0.self_attn.q_proj" in page and 'id="step"' not in page
    assert len(data_of(page)["frames"][0]["ranks"]) == 1


def test_a_users_mistake_gives_exit_code_2_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for folders, said in (
        ([tmp_path / "nothing"], "There is no folder"),
        ([tmp_path], "adapter_config.json"),
        ([trained, tmp_path], "adapter_config.json"),
    ):
        code, _, err = call("report", *folders, "-o", page)
        assert code == 2 and said in err and "Traceback" not in err
        assert not page.exists()
    page.write_text("mine")
    code, _, err = call("report", trained, "-o", page)
    assert code == 2 and "--overwrite" in err and page.read_text() == "mine"
    code, _, err = call("report", trained, "-o", tmp_path)
    assert code == 2 and "is a folder" in err
    assert call("report", trained, "-o", page, "--overwrite")[0] == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["page.html"]


def test_the_spectra_drawn_are_those_of_every_layer_under_its_kind(page: str, trained: Path) -> None:
    lines = data_of(page)["figures"]["spectra-0"]["data"]
    spectra = update_spectra(trained)
    assert {line["text"]: len(line["y"]) for line in lines} == {
        path: len(values) for path, values in spectra.items() if values
    }
    for line in lines:
        assert line["y"] == pytest.approx(spectra[line["text"]], rel=1e-3)
        assert line["text"].endswith(line["name"])
    assert sum(line["showlegend"] for line in lines) == len({line["name"] for line in lines})


def test_names_from_files_are_text_and_never_markup(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "</script><script>alert(2)</script>"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("# </pre><script>alert(3)</script>")
    page = render_report([folder])
    assert "<img src=x" not in page and "alert(2)</script>" not in page and "alert(3)</script>" not in page


def test_long_names_leave_room_for_the_picture(tmp_path: Path) -> None:
    name = "a_long_name_that_somebody_chose_for_a_layer_" * 4
    model = nn.ModuleDict(
        {str(at): nn.ModuleDict({f"{name}{n}": nn.Linear(4, 4) for n in "ab"}) for at in range(2)}
    )
    rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    drawn = data_of(render_report([tmp_path]))["figures"]
    heat_map = next(each for each in drawn.values() if each["data"][0]["type"] == "heatmap")
    assert [title[-1] for title in heat_map["layout"]["xaxis"]["ticktext"]] == ["a", "b"]
    assert heat_map["layout"]["height"] < 400


def test_an_axis_of_a_narrow_range_has_ticks() -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 would have none between 0.21 and 0.49."""
    assert "dtick" not in figures._log_axis([0.21, 0.49], "~g")
    assert figures._log_axis([0.01, 0.49], "~g")["dtick"] == "D2"
    assert figures._log_axis([], "~g")["type"] == "log"


class Mixed(nn.Module):
    """A layer of each kind that is wider than its rank, and one that is narrower."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 4, 3, padding=1, groups=groups)
        self.wide = nn.Linear(20, 9)
        self.narrow = nn.Linear(2, 9)


@pytest.mark.parametrize("method", ["lora", "adalora", "principal"])
def test_spectra_are_those_of_the_change_that_merging_makes(method: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Mixed(groups=1 if method == "lora" else 2).double()
    targets = ["embedding", "conv", "wide", "narrow"]
    if method == "lora":
        config = rw.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=targets)
    else:
        start = {"init_lora_weights": True} if method == "adalora" else {}
        config = rw.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=targets, **start
        )
    before = {name: module.weight.detach().clone() for name, module in model.named_children()}
    model = rw.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    if method != "lora":
        model.finalize_ranks()
    model.save_pretrained(tmp_path / "adapter")
    spectra = update_spectra(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert spectra.keys() == before.keys()
    for name, values in spectra.items():
        change = (getattr(merged, name).weight - before[name]).flatten(1)
        exact = torch.linalg.svdvals(change)[: len(values)]
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), exact, rtol=1e-9, atol=1e-9)


def test_a_convolution_with_groups_has_no_single_spectrum_in_lora(tmp_path: Path) -> None:
    config = rw.LoraConfig(r=2, target_modules=["conv", "wide"])
    rw.get_peft_model(Mixed(groups=2), config).save_pretrained(tmp_path / "adapter")
    assert update_spectra(tmp_path / "adapter").keys() == {"wide"}


def test_an_adapter_whose_update_is_not_a_product_has_no_spectra_and_a_note(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    page = render_report([tmp_path / "adapter"])
    assert "The spectra of the updates are left out" in page
    assert not any(name.startswith("spectra") for name in data_of(page)["figures"])


def test_several_large_models_and_long_runs_fit(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [
                nn.ModuleDict({f"proj{k}": nn.Linear(4, 4, bias=False) for k in range(25)}) for _ in range(24)
            ]
            self.layers = nn.ModuleList(blocks)

    model = rw.get_peft_model(Many(), rw.LoraConfig(r=4, target_modules="all-linear"))
    layers = [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    ranks = torch.full((len(layers),), 4)
    generator = torch.Generator().manual_seed(0)
    folders = [tmp_path / f"run-{number}" for number in range(3)]
    model.save_pretrained(tmp_path / "adapter")
    for folder in folders:
        shutil.copytree(tmp_path / "adapter", folder)
        history = RankHistory(layers)
        for step in range(100):
            history.record(step, 6000 - step, torch.randint(0, 5, ranks.shape, generator=generator))
        history.record(100, len(layers) * 4, ranks)
        history.save(folder / "rank_history.json")
    write_report(folders, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000
    for frame in data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["frames"]:
        assert frame["steps"][0] == 0 and frame["steps"][-1] == 100 and len(frame["steps"]) >= 10
        assert frame["ranks"][-1] == ranks.tolist()


def test_a_page_that_would_be_too_large_shows_fewer_steps(
    trained: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [whole] = data_of(page)["frames"]
    monkeypatch.setattr("rankwise.report.html._MOST_BYTES", len(page.encode()))
    [frame] = data_of(render_report([trained]))["frames"]
    assert 2 <= len(frame["steps"]) < len(whole["steps"])
    for end in (0, -1):
        assert (frame["steps"][end], frame["ranks"][end]) == (whole["steps"][end], whole["ranks"][end])


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of experts and of attention, trained until some have lost ranks."""
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=5, tfinal=1, target_modules="all-linear", target_parameters=EXPERTS
    )
    model = rw.get_peft_model(tiny_moe(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(input_ids=some_tokens(), labels=some_tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("experts") / "adapter"
    model.save_pretrained(folder)
    return folder


def test_every_expert_has_its_history(experts: Path) -> None:
    history = RankHistory.load(experts / "rank_history.json")
    data = data_of(render_report([experts]))
    [frame] = data["frames"]
    assert frame["steps"] == [*(record.step for record in history.records), 5] and len(frame["steps"]) > 3
    titles = [paths[0] for paths in _hovered(data, "ranks-0-1")]
    assert titles == [f"model.layers.{layer}.mlp.experts.gate_up_proj.0" for layer in (0, 1)]
    for record, ranks in zip([*history.records, history.records[-1]], frame["ranks"], strict=True):
        known = dict(zip(history.layers, record.ranks, strict=True))
        for name, rows in frame["cells"].items():
            for paths, cells in zip(_hovered(data, name), rows, strict=True):
                assert [ranks[cell] for cell in cells] == [known[path] for path in paths]


def _hovered(data: Any, name: str) -> list[list[str]]:
    """The layers of a heat map by row, as the page names them to a user who points at them."""
    return data["figures"][name]["data"][0]["customdata"]


def test_metrics_have_their_titles_and_formats(page: str, trained: Path) -> None:
    after = json.loads((trained / "results.json").read_text())["after"]
    assert f"<b>{after['accuracy']:.2%}</b>" in page and ">accuracy</th>" in page
    assert f"<b>{after['loss']:.4f}</b>" in page and ">held-out loss</th>" in page


def test_more_ranks_than_the_budget_are_explained(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    history = json.loads((tmp_path / "run" / "rank_history.json").read_text())
    assert "ranks of average size" not in render_report([tmp_path / "run"])
    history["records"][-1]["budget"] -= 1
    (tmp_path / "run" / "rank_history.json").write_text(json.dumps(history))
    assert "ranks of average size" in render_report([tmp_path / "run"])


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


@pytest.fixture(scope="module")
def file(trained: Path, page: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_report([trained, trained / "checkpoint-5"]), encoding="utf-8")
    return path.as_uri()


def opened(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """The page in a browser, and the browser's error messages and further requests."""
    tab = browser.new_page(**options)
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    tab.on("request", lambda request: troubles.append(request.url) if request.url != url else None)
    tab.goto(url)
    tab.set_default_timeout(10_000)
    tab.wait_for_selector("#ranks-0-0 .xtick text")
    return tab, troubles


def ranks_shown(tab: Any, name: str = "ranks-0-0") -> list[int]:
    return [int(text) for text in tab.locator(f"#{name} .heatmap-label").all_text_contents() if text]


def test_the_slider_moves_the_heat_maps_and_the_console_stays_empty(
    browser: Any, file: str, trained: Path
) -> None:
    from playwright.sync_api import expect

    history = RankHistory.load(trained / "rank_history.json")
    tab, troubles = opened(browser, file)
    assert sorted(ranks_shown(tab)) == sorted(history.records[-1].ranks)
    slider = tab.locator("#step")
    slider.focus()
    tab.keyboard.press("Home")
    expect(tab.locator("#where")).to_have_text("0")
    assert ranks_shown(tab) == history.records[0].ranks
    tab.keyboard.press("ArrowRight")
    second = history.records[1]
    expect(tab.locator("#where")).to_have_text(f"{second.step}")
    assert sorted(ranks_shown(tab)) == sorted(second.ranks)
    assert f"budget {second.budget}" in tab.locator(".at").first.text_content()
    tab.keyboard.press("Home")
    tab.locator("#play").click()
    last = json.loads((trained / "results.json").read_text())["steps"]
    expect(tab.locator("#where")).to_have_text(f"{last}")
    assert sorted(ranks_shown(tab)) == sorted(history.records[-1].ranks)
    assert troubles == []


def test_the_slider_ends_with_the_run(browser: Any, file: str, trained: Path) -> None:
    from playwright.sync_api import expect

    steps = json.loads((trained / "results.json").read_text())["steps"]
    assert RankHistory.load(trained / "rank_history.json").records[-1].step < steps
    tab, _ = opened(browser, file)
    expect(tab.locator("#where")).to_have_text(f"{steps}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_rank_is_legible_on_its_colour(browser: Any, file: str, trained: Path, scheme: str) -> None:
    """The contrast by WCAG 2 of each number in the heat map with its cell is at least 4.5 to 1."""
    tab, _ = opened(browser, file, color_scheme=scheme)
    labels = '[...document.querySelectorAll("#ranks-0-0 .heatmap-label text")].filter((e) => e.textContent)'
    found = tab.evaluate(f"{labels}.map((e) => [Number(e.textContent), getComputedStyle(e).fill])")
    assert found
    empty = tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--empty').trim()")
    for rank, ink in found:
        ground = rank_colour(rank, 4) if rank else tuple(int(empty[at : at + 2], 16) for at in (1, 3, 5))
        tones = sorted(map(luminance, (ground, tuple(map(int, re.findall(r"\d+", ink)[:3])))))
        assert (tones[1] + 0.05) / (tones[0] + 0.05) >= 4.5, (rank, ink)


def luminance(colour: Any) -> float:
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_slider_moves_the_experts_too(browser: Any, experts: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    (tmp_path / "page.html").write_text(render_report([experts]), encoding="utf-8")
    tab, troubles = opened(browser, (tmp_path / "page.html").as_uri())
    assert len(ranks_shown(tab, "ranks-0-1")) == 8 and set(ranks_shown(tab, "ranks-0-1")) != {4}
    tab.locator("#step").focus()
    tab.keyboard.press("Home")
    expect(tab.locator("#where")).to_have_text("0")
    assert ranks_shown(tab, "ranks-0-1") == [4] * 8
    assert troubles == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_fits_phones_and_desks(browser: Any, file: str, width: int) -> None:
    tab, troubles = opened(browser, file, viewport={"width": width, "height": 800}, has_touch=width < 500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for chart in tab.locator(".chart").all():
        box = chart.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 40
        assert chart.locator("svg.main-svg").count() > 0
    assert troubles == []


def test_colours_follow_dark_mode_and_paper_is_light(browser: Any, file: str) -> None:
    from playwright.sync_api import expect

    tab, troubles = opened(browser, file, color_scheme="light")

    def ink() -> str:
        return str(tab.evaluate("getComputedStyle(document.querySelector('#loss .xtick text')).fill"))

    light = ink()
    tab.emulate_media(color_scheme="dark")
    expect(tab.locator("#loss .xtick text").first).not_to_have_css("fill", light)
    dark = ink()
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) > 600 > sum(map(int, re.findall(r"\d+", light)[:3]))
    assert tab.pdf().startswith(b"%PDF")
    assert troubles == []


def test_without_javascript_the_tables_are_there(browser: Any, file: str) -> None:
    tab = browser.new_page(java_script_enabled=False)
    tab.goto(file)
    assert "charts need JavaScript" in tab.locator("noscript").inner_text()
    tab.locator("summary", has_text="The last ranks as tables").click()
    assert tab.locator("details[open] table").count() > 0
