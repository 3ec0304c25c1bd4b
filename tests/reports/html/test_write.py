from __future__ import annotations

import html
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tcaq_lightning.__main__ import main
from tcaq_lightning.calibration.run_dir import sealed
from tcaq_lightning.evaluation.layer_sensitivity import FILE as SENSITIVITY
from tcaq_lightning.evaluation.layer_sensitivity import measure_sensitivity
from tcaq_lightning.reports.finished_run import read_finished
from tcaq_lightning.reports.html.write import write_page

SECTIONS = [
    "summary",
    "images",
    "coverage",
    "sizes",
    "latency",
    "sensitivity",
    "noise-error",
    "mismatch",
    "tcr",
    "daq",
    "units",
    "stages",
    "manifest",
]


@pytest.fixture
def page_of(parse: Callable[[str], Any]) -> Callable[[Path], Any]:
    def run(run_dir: Path) -> Any:
        output = run_dir / "report.html"
        write_page(read_finished(run_dir), output)
        return parse(output.read_text())

    return run


@pytest.fixture(scope="module")
def written(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its page, for tests that only look at it."""
    run_dir = Path(shutil.copytree(trained, tmp_path_factory.mktemp("written") / "run"))
    write_page(read_finished(run_dir), run_dir / "report.html")
    return run_dir


@pytest.fixture
def bare(run_dir: Path) -> Path:
    """A run that kept no statistics and logged nothing: its page has few figures."""
    shutil.rmtree(run_dir / "tensorboard")
    shutil.rmtree(run_dir / "rounds" / "00" / "statistics")
    return run_dir


def section(page: Any, name: str) -> Any:
    (found,) = page.all("section", id=name)
    return found


def rows(page: Any, name: str, title: str) -> list[list[str]]:
    """Rows of the table of a section whose caption or label begins with a title."""
    for table in section(page, name).all("table"):
        captions = [c.text for c in table.all("caption")] + [table.attributes.get("aria-label", "")]
        if any(c.startswith(title) for c in captions):
            return list(table.rows())
    raise KeyError(title)


def exact(*values: Any) -> list[str]:
    """Values as a table's cells hold them."""
    return ["" if v is None else repr(v) if isinstance(v, (int, float)) else str(v) for v in values]


def metrics_of(run_dir: Path) -> Any:
    return json.loads((run_dir / "metrics.json").read_text())


def edit(run_dir: Path, change: Callable[[Any], None]) -> None:
    content = metrics_of(run_dir)
    change(content)
    (run_dir / "metrics.json").write_text(json.dumps(content))


def test_figures_are_those_of_the_metrics(written: Path, parse: Callable[[str], Any]) -> None:
    page, metrics = parse((written / "report.html").read_text()), metrics_of(written)
    cards = {d.text: e.text for d, e in zip(page.all("dt"), page.all("dd"), strict=True)}
    assert cards["noise error, mean over t > 0"] == f"{metrics['noise_error']['summary']:.4g}"
    images = metrics["same_noise"]
    mse = "{:.4g}, median {:.4g}, worst {:.4g}".format(*(images[k] for k in ("mse", "mse_median", "mse_worst")))
    assert cards["same-noise image MSE, clipped (4 images)"] == mse
    assert cards["same-noise image PSNR"].startswith(f"{images['psnr']:.2f} dB, median {images['psnr_median']:.2f} dB")

    expected = [[r["name"], r["kind"], r["bits"], str(r["parameters"]), r["note"]] for r in metrics["coverage"]]
    assert rows(page, "coverage", "All") == expected
    by_bits = {row[0]: row for row in rows(page, "coverage", "By bits")}
    assert sum(int(row[1]) for row in by_bits.values()) == len(expected)
    assert by_bits["W4 A4"][2] == str(sum(r["parameters"] for r in metrics["coverage"] if r["bits"] == "W4 A4"))
    size = metrics["bytes"]
    assert [row[1] for row in rows(page, "sizes", "The same")] == exact(size["full"], size["quantized"])

    noise = metrics["noise_error"]
    by_step = zip(noise["timesteps"], noise["relative"], noise["bias"], strict=True)
    assert rows(page, "noise-error", "The same") == [exact(*values) for values in by_step]
    by_step = zip(metrics["rounds"][0]["timesteps"], *(r["mismatch"] for r in metrics["rounds"]), strict=True)
    assert rows(page, "mismatch", "By timestep") == [exact(*values) for values in by_step]
    outcome = [exact(r["round"], r["mean_mismatch"], "kept" if r["kept"] else "undone") for r in metrics["rounds"]]
    assert rows(page, "mismatch", "Rounds") == outcome

    errors = [e for u in metrics["units"] for e in (u.get("tcr_output_error") or {}).values()]
    assert [row[1:3] for row in rows(page, "tcr", "All inputs")] == [exact(*pair) for pair in errors]
    (choice,) = (c for u in metrics["units"] for c in (u.get("attention") or {}).values())
    (row,) = rows(page, "daq", "Means")
    assert float(row[3]) == pytest.approx(np.mean(choice["uniform_error"]))
    assert float(row[4]) == pytest.approx(np.mean(choice["log_error"]))
    keys = ("round", "unit", "before", "learned", "after", "undecided", "flipped")
    units = [exact(*(u.get(k) for k in keys), "kept" if u["kept"] else "restored") for u in metrics["units"]]
    assert rows(page, "units", "All units") == units
    seconds = sorted(metrics["stages"].items(), key=lambda item: -item[1])
    assert [row[:2] for row in rows(page, "stages", "The same")] == [exact(*item) for item in seconds]

    manifest = json.loads((written / "manifest.json").read_text())
    assert dict(rows(page, "manifest", "Versions")) == manifest["versions"]
    plan = dict(rows(page, "manifest", "The plan"))
    assert plan["units"] == str(manifest["plan"]["units"])
    assert "num_trajectories: 4" in section(page, "manifest").all("pre")[0].text


def test_the_page_is_whole_and_needs_nothing_else(written: Path, parse: Callable[[str], Any]) -> None:
    text = (written / "report.html").read_text()
    page = parse(text)
    assert [s.attributes["id"] for s in page.all("section")] == SECTIONS
    assert [a.attributes["href"] for a in page.all("nav")[0].all("a")] == [f"#{name}" for name in SECTIONS]
    for element in page:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), element
    assert "://" not in text.replace(str(written), "")
    assert "@import" not in text
    assert "url(http" not in text
    ids = [e.attributes["id"] for e in page if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    figures = page.all("figure")
    assert len(figures) >= 30
    for figure in figures:
        assert len(figure.all("figcaption")[0].text) > 20
        pictures = figure.all("img") + figure.all("svg")
        assert len(pictures) == 1
        assert pictures[0].attributes.get("alt") or pictures[0].attributes.get("aria-label")
    for name in ("noise-error", "mismatch", "tcr", "daq", "units", "stages", "sizes"):
        assert section(page, name).all("svg"), name
    assert not list(written.rglob("*.tmp"))
    maps = [f for f in section(page, "tcr").all("figure") if "below after shift" in f.all("figcaption")[0].text]
    assert len(maps) == len([r for s in read_finished(written).statistics.values() for r in s.r.values() if len(r) > 1])
    assert "Fitted tails of the distributions, 2 figures" in section(page, "daq").text
    assert "Loss curves of the 7 units" in section(page, "units").text


def test_measurements_are_shown_once_they_are_there(bare: Path, page_of: Callable[[Path], Any]) -> None:
    page = page_of(bare)
    assert "Not measured. Add --latency" in section(page, "latency").text
    assert "Not measured. Add --sensitivity" in section(page, "sensitivity").text

    config = read_finished(bare).manifest["config"]
    measured = measure_sensitivity(bare, config, 1)
    digest = json.loads((bare / SENSITIVITY).read_text())["key"]["artifact"]
    row = {
        "batch": 2,
        "seconds": 0.5,
        "fastest": 0.25,
        "slowest": 1.0,
        "calls": 5,
        "peak": 3_000_000,
        "idle": 1_000_000,
    }
    content = {
        "machine": "a <b>machine</b>",
        "threads": 1,
        "rows": [
            {"model": "full precision", "backend": "torch", **row},
            {"model": "quantized", "backend": "torch", **row, "seconds": 0.75},
            {"model": "quantized", "backend": "torch", **row, "seconds": 1.5, "batch": 4},
            {"model": "quantized", "backend": "other", "problem": "not <i>installed</i>"},
        ],
    }
    (bare / "report" / "latency.json").write_text(json.dumps({"key": {"artifact": digest}, "content": content}))
    page = page_of(bare)
    ranked = rows(page, "sensitivity", "The whole ranking")
    parts = {name: p for name, p in measured["parts"].items() if name in {r[1] for r in ranked}}
    assert len(ranked) == len(measured["parts"]) - 1
    assert [float(r[4]) for r in ranked] == sorted((p["summary"] for p in parts.values()), reverse=True)
    assert all(float(a[4]) >= float(b[4]) for a, b in pairwise(ranked))
    assert {r[1]: r[4] for r in ranked} == {name: repr(p["summary"]) for name, p in parts.items()}
    bits = {r["name"]: r["bits"] for r in metrics_of(bare)["coverage"]}
    assert all(r[3] == bits[r[1]] for r in ranked if r[2] == "layer")
    assert next(r[3] for r in ranked if r[2] == "attention") == "A4 A4, P4 A4"

    found = rows(page, "latency", "By model")
    assert found[0] == ["full precision", "torch", "2", "0.5", "0.25", "1.0", "1.0", "3000000", "2000000"]
    assert found[1][6] == repr(0.5 / 0.75)
    assert found[2][6] == ""  # the full-precision model was not measured at this batch size
    text = section(page, "latency").text
    assert "a <b>machine</b>" in text
    assert "quantized, other: not measured, not <i>installed</i>" in text

    stored = json.loads((bare / SENSITIVITY).read_text())
    stored["content"]["parts"].pop("all layers and attentions")
    (bare / SENSITIVITY).write_text(json.dumps(stored))
    assert "not complete" in section(page_of(bare), "sensitivity").text


def test_a_run_by_rounding_to_nearest_says_what_it_has_not(bare: Path, page_of: Callable[[Path], Any]) -> None:
    def strip(metrics: Any) -> None:
        metrics["units"] = [u for u in metrics["units"] if u["round"] == 0]
        metrics["rounds"] = metrics["rounds"][:1]
        for unit in metrics["units"]:
            unit |= {"tcr_output_error": {}, "attention": {}, "flipped": 0.0}
            for key in ("learned", "undecided"):
                unit.pop(key, None)

    edit(bare, strip)
    shutil.rmtree(bare / "samples")
    page = page_of(bare)
    assert "written no pictures" in section(page, "images").text
    assert "recorded no ranges" in section(page, "tcr").text
    assert "no quantized attention" in section(page, "daq").text
    assert "Nothing was learned" in section(page, "units").text
    assert "PAR was off" in section(page, "mismatch").text
    assert [s.attributes["id"] for s in page.all("section")] == SECTIONS


def test_almost_nothing_measured_makes_a_page_too(bare: Path, page_of: Callable[[Path], Any]) -> None:
    nothing = {"stages": {}, "rounds": [], "units": [], "coverage": []}
    (bare / "metrics.json").write_text(json.dumps(nothing))
    page = page_of(bare)
    assert [s.attributes["id"] for s in page.all("section")] == SECTIONS
    for name in ("coverage", "sizes", "noise-error", "mismatch", "daq", "units", "stages"):
        assert section(page, name).text.count("The run") or section(page, name).text.count("The model"), name


def test_values_that_were_not_finite_leave_gaps(bare: Path, page_of: Callable[[Path], Any]) -> None:
    def damage(metrics: Any) -> None:
        metrics["noise_error"] |= {"summary": None, "relative": [None] * 4, "bias": [None] * 4}
        metrics["same_noise"] |= {"mse": None, "psnr": None}
        for record in metrics["rounds"]:
            record |= {"mean_mismatch": None, "mismatch": [None] * 4}
        for unit in metrics["units"]:
            unit |= {"before": None, "after": None, "learned": None}
            for choice in (unit.get("attention") or {}).values():
                choice |= {"uniform_error": [None, None], "R": [None, None]}

    edit(bare, damage)
    page = page_of(bare)
    assert [row[1] for row in rows(page, "noise-error", "The same")] == [""] * 4


def test_hostile_names_in_files_stay_text(bare: Path, page_of: Callable[[Path], Any]) -> None:
    hostile = '<script>alert(1)</script>"$x_1$&lt;'

    def rename(metrics: Any) -> None:
        metrics["coverage"][0] |= {"name": hostile, "bits": hostile, "kind": hostile, "note": hostile}
        metrics["stages"][hostile] = 1e6
        metrics["sampler"] |= {"scheduler": hostile, "options": {hostile: hostile}}
        for unit in metrics["units"]:
            unit["unit"] += hostile
            unit["attention"] = {name + hostile: choice for name, choice in (unit.get("attention") or {}).items()}
            errors = unit.get("tcr_output_error") or {}
            unit["tcr_output_error"] = {name + hostile: pair for name, pair in errors.items()}

    edit(bare, rename)
    manifest = json.loads((bare / "manifest.json").read_text())
    manifest["config"]["model"]["path"] = hostile
    manifest |= {"version": hostile, "plan": {hostile: [hostile]}, "inputs": {hostile: hostile}}
    (bare / "manifest.json").write_text(json.dumps(sealed(manifest)))
    page = page_of(bare)
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0].text
    assert not any(name.startswith("on") for element in page for name in element.attributes)
    assert rows(page, "coverage", "All")[0] == [hostile, hostile, hostile, rows(page, "coverage", "All")[0][3], hostile]
    assert any(hostile in t.text for t in section(page, "stages").all("text"))
    assert hostile in page.all("header")[0].text


def test_damaged_pictures_and_events_do_not_end_the_report(run_dir: Path, page_of: Callable[[Path], Any]) -> None:
    shutil.rmtree(run_dir / "rounds" / "00" / "statistics")
    (run_dir / "samples" / "grid.png").write_bytes(b"<html>")
    for file in (run_dir / "tensorboard").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 3])
    page = page_of(run_dir)
    assert "grid.png is damaged" in section(page, "images").text
    assert [s.attributes["id"] for s in page.all("section")] == SECTIONS


def test_runs_without_statistics_show_what_tensorboard_has(run_dir: Path, page_of: Callable[[Path], Any]) -> None:
    shutil.rmtree(run_dir / "rounds" / "00" / "statistics")
    page = page_of(run_dir)
    assert len(section(page, "tcr").all("img")) >= 5
    assert len(section(page, "daq").all("img")) == 1


def test_the_command_writes_the_page(
    bare: Path, parse: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = bare.parent / "elsewhere" / "page.html"
    assert main(["report", str(bare), "--output", str(output), "--sensitivity", "1"]) == 0
    assert str(output) in capsys.readouterr().out.replace("\n", "")
    assert rows(parse(output.read_text()), "sensitivity", "The whole ranking")
    first = output.read_bytes()
    assert main(["report", str(bare)]) == 0
    assert (bare / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/nowhere"], "/nowhere holds no run"),
        (["RUN", "--latency", "[0]"], "--latency must be at least 1, got 0"),
        (["RUN", "--latency", "many"], "many"),
        (["RUN", "--sensitivity", "-1"], "--sensitivity must be at least 0"),
        (["RUN", "--threads", "0"], "--threads"),
        (["RUN", "--output", "RUN"], "--output: expected a file"),
        (["RUN/quantized"], "quantized holds no run"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], text: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(a.replace("RUN", str(trained)) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert not (trained / "report.html").exists()


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no Chromium was found; on Debian: apt-get install chromium")
    return found


def screenshot(page: Path, output: Path, width: int, height: int, *options: str) -> np.ndarray:
    """(H, W, 3) pixels of a page, by headless Chromium without a network."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={output.parent / 'profile'}",
        f"--window-size={width},{height}",
        f"--screenshot={output}",
        *options,
        page.as_uri(),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert output.is_file(), errors.decode()
    assert "Content Security Policy" not in errors.decode()  # it would refuse the page's own script
    assert "CONSOLE" not in errors.decode()
    return np.asarray(Image.open(io.BytesIO(output.read_bytes())).convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(width: int, written: Path, tmp_path: Path) -> None:
    """The page with all that folds unfolded, measured by a script of the test within the same browser."""
    browser()
    output = written / "report.html"
    pixels = screenshot(output, tmp_path / "page.png", width, 3000)
    assert pixels.shape == (3000, width, 3)
    background = pixels[0, 0]
    rows_with_ink = (pixels != background).any(axis=(1, 2)).mean()
    assert rows_with_ink > 0.4  # text and plots all the way down
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50

    # In a frame, since a window has a least width. What does not fit a small screen scrolls within its own box.
    probe = tmp_path / "probe.html"
    script = """
    addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument;
      for (const details of page.querySelectorAll("details")) details.open = true;
      const empty = [...page.querySelectorAll("svg, img")].filter(
        (e) => e.getBoundingClientRect().height < 10 || e.complete === false || e.naturalWidth === 0);
      const button = page.querySelector("#noise-error th.number button");
      const keys = () => [...button.closest("table").tBodies[0].rows].map((r) => Number(r.cells[0].dataset.value));
      button.click(); const up = keys(); button.click(); const down = keys();
      document.body.replaceChildren(JSON.stringify({
        wide: page.documentElement.scrollWidth, empty: empty.length, up, down,
        figures: page.querySelectorAll("figure").length }));
    })"""
    frame = f'<iframe width="{width}" height="3000" srcdoc="{html.escape(output.read_text())}"></iframe>'
    probe.write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script><body>{frame}</body>")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},3000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    body = dumped[dumped.index("<body") :]
    found = json.loads(body[body.index("{") : body.rindex("}") + 1].replace("&quot;", '"'))
    assert found["wide"] <= width
    assert found["empty"] == 0
    assert found["figures"] >= 30
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]


@pytest.mark.slow
def test_a_browser_shows_it_light_on_dark_where_that_is_preferred(written: Path, tmp_path: Path) -> None:
    browser()
    output = written / "report.html"
    options = ["--blink-settings=preferredColorScheme=0"]
    dark = screenshot(output, tmp_path / "dark.png", 1000, 1500, *options)
    light = screenshot(output, tmp_path / "light.png", 1000, 1500)
    assert dark[0, 0].mean() < 60
    assert light[0, 0].mean() > 200
