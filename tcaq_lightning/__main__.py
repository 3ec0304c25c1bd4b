"""Commands on models, finished runs and images: sample, evaluate, statistics, report, export, convert.

python -m tcaq_lightning sample runs/quickstart/quantized --num 64 --output grid.png
python -m tcaq_lightning evaluate runs/quickstart/quantized --full fashion-mnist-ddpm --output metrics.json
python -m tcaq_lightning evaluate IMAGES --features inception --metrics fid,sfid,is --reference REFERENCE.npz
python -m tcaq_lightning statistics IMAGES REFERENCE.safetensors
python -m tcaq_lightning report runs/quickstart
python -m tcaq_lightning export runs/quickstart/quantized --format openvino exported
python -m tcaq_lightning convert model.ckpt models/lsun-bedrooms --architecture lsun-bedrooms-ldm4
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.exit_codes import run_cli


def sample(
    path: str,
    num: int = 64,
    output: Path = Path("grid.png"),
    scheduler: str | None = None,
    steps: int = 20,
    eta: float = 0.0,
    options: dict[str, Any] | None = None,
    prompts: Path | None = None,
    negative_prompt: str | None = None,
    class_labels: list[int] | None = None,
    guidance_scale: float | None = None,
    call_options: dict[str, Any] | None = None,
    backend: Literal["torch", "openvino", "onnxruntime"] = "torch",
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
) -> None:
    """Sample images and write them as one PNG.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model.
        num: number of images.
        output: PNG file.
        scheduler: class name in diffusers, such as UniPCMultistepScheduler; without it, the model's own.
        steps: sampler steps.
        eta: DDIM's noise share.
        options: further settings of the scheduler, as in --options.clip_sample false.
        prompts: text file with one prompt a line, for a model that takes text.
        negative_prompt: what guidance leads away from.
        class_labels: classes that the images take in turn; without them, all of a class-conditional model's.
        guidance_scale: classifier-free guidance; without it, the pipeline's own.
        call_options: further arguments of the pipeline's call, as in --call_options.height 512.
        backend: what runs the denoiser of an artifact: PyTorch, or integer kernels of OpenVINO or ONNX Runtime.
        seed: of the noise.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
    """
    import torch

    from tcaq_lightning.config import ConditioningConfig
    from tcaq_lightning.evaluation.grid import save_images
    from tcaq_lightning.models import pipelines
    from tcaq_lightning.models.sampling import make_sampling

    _at_least(1, num=num, steps=steps, batch_size=batch_size, threads=threads)
    _at_least(0, seed=seed)
    _set_threads(threads)
    sampler = _sampler(scheduler, steps, eta, options)
    pipeline = open_model(path, backend)
    _, denoiser = pipelines.find_denoiser(pipeline)
    conditioning = ConditioningConfig(prompts, negative_prompt, class_labels, guidance_scale, call_options or {})
    sampling = make_sampling(pipeline, conditioning)
    sampling.check(denoiser, sampler, "sampler")
    _check_writable(output)
    parts = []
    with _progress(num) as advance:
        for start in range(0, num, batch_size):
            indices = range(start, min(start + batch_size, num))
            parts.append(sampling.sample(denoiser, sampler, indices, seed).cpu())
            advance(len(indices))
    save_images(pipelines.to_images(torch.cat(parts)), output, columns=math.ceil(math.sqrt(num)))


def evaluate(
    path: str,
    full: str | None = None,
    num_images: int = 512,
    num_trajectories: int = 32,
    fid_samples: int | None = None,
    features: str = "fashion-mnist-features",
    scheduler: str | None = None,
    steps: int = 20,
    eta: float = 0.0,
    options: dict[str, Any] | None = None,
    prompts: Path | None = None,
    negative_prompt: str | None = None,
    class_labels: list[int] | None = None,
    guidance_scale: float | None = None,
    call_options: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    output: Path | None = None,
    cache: Path | None = None,
    metrics: str = "fid",
    reference: str | None = None,
    inception_weights: str | None = None,
    is_splits: int = 10,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    neighbours: int = 3,
    clip_model: str | None = None,
    clip_prompts: str | None = None,
    save_images: str | None = None,
    devices: int = 1,
    accelerator: str = "auto",
) -> None:
    """Measure FID and other metrics of a model or of images that exist already.

    Beside a full-precision model also the noise error and the same-noise images' MSE and PSNR.

    Args:
        path: quantized artifact, full-precision model in diffusers layout, or name of a shipped model; or images: a
            folder of PNG or other pictures, or an .npz with uint8 `arr_0` (N, H, W, C).
        full: full-precision model to compare with.
        num_images: images of both models from the same noise.
        num_trajectories: full-precision trajectories for the noise error.
        fid_samples: images for the metrics, 0 leaves them out; by default 5000 of a model, all where path is images.
        features: feature extractor: inception, a directory, or the name of a shipped one.
        scheduler: class name in diffusers, such as UniPCMultistepScheduler; without it, the model's own.
        steps: sampler steps.
        eta: DDIM's noise share.
        options: further settings of the scheduler, as in --options.clip_sample false.
        prompts: text file with one prompt a line, for a model that takes text.
        negative_prompt: what guidance leads away from.
        class_labels: classes that the images take in turn; without them, all of a class-conditional model's.
        guidance_scale: classifier-free guidance; without it, the pipeline's own.
        call_options: further arguments of the pipeline's call, as in --call_options.height 512.
        seed: of the noise.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
        output: JSON file for all figures.
        cache: directory for finished batches, so that the same command goes on after it was killed.
        metrics: some of fid, sfid, is, kid, precision_recall and clip, with commas between them.
        reference: real images: a folder, an .npz with images or statistics, or what the command statistics wrote.
        inception_weights: torch-fidelity's weights of Inception v3; without it, its file in torch hub's cache.
        is_splits: parts of the images whose inception scores are averaged.
        kid_subsets: random subsets that KID is averaged over.
        kid_subset_size: images in each of them.
        neighbours: k of precision and recall.
        clip_model: directory of a CLIP model in transformers' layout.
        clip_prompts: text file with the prompt of each image, one a line.
        save_images: directory for all images as PNG files.
        devices: processes of this node that share the work; torchrun and SLURM set it themselves.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps.
    """
    from tcaq_lightning.config import ConditioningConfig, EvaluationConfig, TrainerConfig
    from tcaq_lightning.evaluation.scores import check_metrics
    from tcaq_lightning.runtime.distributed.launch import connected
    from tcaq_lightning.runtime.lightning import quiet_lightning

    _at_least(1, num_images=num_images, num_trajectories=num_trajectories, steps=steps, batch_size=batch_size)
    _at_least(1, threads=threads, devices=devices)
    _at_least(0, fid_samples=fid_samples, seed=seed)
    images = _is_images(path)
    config = EvaluationConfig(
        num_trajectories=num_trajectories,
        num_images=num_images,
        fid_samples=(0 if images else 5000) if fid_samples is None else fid_samples,
        features=features,
        batch_size=batch_size,
        sampler=_sampler(scheduler, steps, eta, options),
        metrics=[name.strip() for name in metrics.split(",")],
        reference=reference,
        inception_weights=inception_weights,
        is_splits=is_splits,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        neighbours=neighbours,
        clip_model=clip_model,
        clip_prompts=clip_prompts,
        save_images=save_images,
    )
    check_metrics(config)
    if images and (full is not None or save_images is not None or fid_samples == 0):
        raise UserError(
            f"--full, --save_images and --fid_samples 0 are for models, got images ({path}); leave them out"
        )
    quiet_lightning()
    trainer = TrainerConfig(accelerator=accelerator, devices=devices, threads=threads)
    conditioning = ConditioningConfig(prompts, negative_prompt, class_labels, guidance_scale, call_options or {})
    with connected(trainer):
        if images:
            _measure_images(path, config, trainer, seed, output, cache)
        else:
            _measure_models(path, full, conditioning, config, trainer, seed, output, cache)


def _measure_images(path: str, config: Any, trainer: Any, seed: int, output: Path | None, cache: Path | None) -> None:
    from tcaq_lightning.evaluation.evaluate import evaluate_images
    from tcaq_lightning.evaluation.images import open_images
    from tcaq_lightning.runtime.lightning import choose_device

    images = open_images(Path(path), "path (no model_index.json, so images)")
    if output is not None:
        _check_writable(output)
    with _progress(config.fid_samples or len(images)) as advance:
        metrics = evaluate_images(images, config, seed, cache, advance, choose_device(trainer))
    _show({"images": path, "seed": seed, **metrics.to_dict()}, metrics.seconds, output)


def _measure_models(
    path: str,
    full: str | None,
    conditioning: Any,
    config: Any,
    trainer: Any,
    seed: int,
    output: Path | None,
    cache: Path | None,
) -> None:
    from tcaq_lightning.evaluation import evaluate as evaluation
    from tcaq_lightning.models.pipelines import find_denoiser
    from tcaq_lightning.models.sampling import make_sampling
    from tcaq_lightning.runtime.lightning import choose_device

    pipeline = open_model(path)
    _, denoiser = find_denoiser(pipeline)
    models: dict[str, Any] = {"full": None, "quantized": denoiser}
    if full is not None:
        models["full"] = find_denoiser(open_model(full))[1]
        expected, got = (_interface(model) for model in (denoiser, models["full"]))
        if got != expected:
            raise UserError(
                f"--full: expected a model like {path}, {expected}, got {got} from {full}; give the model that was "
                "quantized"
            )
    elif not is_quantized(path):
        models = {"full": denoiser, "quantized": None}
    sampling = make_sampling(pipeline, conditioning)
    if output is not None:
        _check_writable(output)
    device = choose_device(trainer)
    pipeline.to(device)
    models = {name: None if m is None else m.to(device) for name, m in models.items()}
    total = evaluation.planned_samples(config, sum(m is not None for m in models.values()))
    with _progress(total) as advance:
        metrics = evaluation.evaluate(
            **models,
            sampling=sampling,
            calibration_sampler=config.sampler,
            config=config,
            seed=seed,
            cache_dir=cache,
            advance=advance,
        )
    content = {"model": path, "compared_with": full, "seed": seed, **metrics.to_dict()}
    _show(content, metrics.seconds, output)


def _show(content: dict[str, Any], seconds: dict[str, float], output: Path | None) -> None:
    """The table on the console and the JSON file, by rank 0."""
    from rich.console import Console

    from tcaq_lightning.reports.markdown import final_table
    from tcaq_lightning.runtime.distributed.collectives import is_main, on_main
    from tcaq_lightning.runtime.files import write_json

    if is_main():
        Console().print(final_table({**content, "stages": seconds}))
    if output is not None:
        on_main(lambda: write_json(output, content))


def statistics(
    images: Path,
    output: Path,
    features: str = "inception",
    inception_weights: str | None = None,
    num_features: int = 10_000,
    batch_size: int = 64,
    threads: int | None = None,
    cache: Path | None = None,
    devices: int = 1,
    accelerator: str = "auto",
) -> None:
    """Compute the statistics of real images that evaluate --reference compares with, once for all evaluations.

    Args:
        images: folder of pictures, or .npz with uint8 `arr_0` (N, H, W, C).
        output: .safetensors file.
        features: feature extractor: inception, a directory, or the name of a shipped one.
        inception_weights: torch-fidelity's weights of Inception v3; without it, its file in torch hub's cache.
        num_features: images whose features are kept too, for kid and precision_recall; evenly spaced over all.
        batch_size: images at a time.
        threads: CPU threads; without it, PyTorch's choice.
        cache: directory for finished batches, so that the same command goes on after it was killed.
        devices: processes of this node that share the work; torchrun and SLURM set it themselves.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps.
    """
    from tcaq_lightning.config import EvaluationConfig, TrainerConfig
    from tcaq_lightning.evaluation.images import open_images
    from tcaq_lightning.evaluation.spaces import write_statistics
    from tcaq_lightning.runtime.distributed.launch import connected
    from tcaq_lightning.runtime.lightning import choose_device, quiet_lightning

    _at_least(1, batch_size=batch_size, threads=threads, devices=devices)
    _at_least(0, num_features=num_features)
    if output.suffix != ".safetensors":
        raise UserError(f"output: expected a name that ends in .safetensors, got {output}; give such a name")
    quiet_lightning()
    trainer = TrainerConfig(accelerator=accelerator, devices=devices, threads=threads)
    config = EvaluationConfig(features=features, inception_weights=inception_weights, batch_size=batch_size)
    with connected(trainer):
        found = open_images(images, "images")
        _check_writable(output)
        with _progress(len(found)) as advance:
            write_statistics(found, output, config, num_features, cache, advance, choose_device(trainer))


def _is_images(path: str) -> bool:
    """Whether a path is meant as images: an .npz, or a directory that holds no model."""
    given = Path(path)
    return given.suffix == ".npz" or (given.is_dir() and not (given / "model_index.json").exists())


def report(
    run_dir: Path,
    output: Path | None = None,
    latency: list[int] | None = None,
    sensitivity: int = 0,
    threads: int | None = None,
) -> None:
    """Write one self-contained HTML page about a finished run of train.py.

    What --latency and --sensitivity measure is kept in RUN_DIR/report and shown by later reports too.

    Args:
        run_dir: of a finished run.
        output: HTML file; without it, RUN_DIR/report.html.
        latency: batch sizes, such as [1,8], to measure a denoiser call's time and memory with, on every backend.
        sensitivity: held-out trajectories, such as 8, to measure the noise error of each layer quantized alone on; 0
            leaves it out. A measurement that was stopped goes on.
        threads: CPU threads; without it, PyTorch's choice.
    """
    from rich.console import Console

    from tcaq_lightning.evaluation.latency import measure_latency
    from tcaq_lightning.evaluation.layer_sensitivity import measure_sensitivity
    from tcaq_lightning.reports.html.finished import read_finished
    from tcaq_lightning.reports.html.write import write_page

    for size in latency or []:
        _at_least(1, latency=size)
    _at_least(0, sensitivity=sensitivity)
    _at_least(1, threads=threads)
    _set_threads(threads)
    run = read_finished(run_dir)
    target = run_dir / "report.html" if output is None else output
    _check_writable(target)
    if sensitivity:
        with _progress(1, "layers") as advance:
            measure_sensitivity(run_dir, run.manifest["config"], sensitivity, advance.to)
    if latency:
        measure_latency(run_dir, run.manifest["config"], latency, threads)
    write_page(run, target)
    Console().print(f"report: {target}", soft_wrap=True)


def convert(
    source: Path, output: Path, architecture: str | None = None, ema: bool | None = None, tokenizer: str | None = None
) -> None:
    """Write a published checkpoint as a directory in diffusers layout: DDIM's repository, latent and Stable Diffusion.

    Args:
        source: checkpoint file, read without running any code of it.
        output: new directory.
        architecture: the checkpoint's own YAML file, or the name of a shipped architecture, such as ddim-cifar10;
            --config says the same.
        ema: whether to take the moving average of the weights; without it, if there is one.
        tokenizer: of Stable Diffusion: directory with vocab.json and merges.txt, or hub id.
    """
    from rich.console import Console

    from tcaq_lightning.zoo.conversion import convert as conversion

    record = conversion.convert(source, output, architecture, ema, tokenizer)
    parts = ", ".join(f"{name} {count:,}" for name, count in record["parameters"].items())
    Console(soft_wrap=True).print(f"{output}: {record['weights']}, parameters: {parts}", highlight=False)


def export(
    path: str,
    output: Path,
    format: Literal["onnx", "openvino"] = "onnx",  # noqa: A002 - the option's name
    four_bit: bool = True,
    tokens: int | None = None,
    latents: list[int] | None = None,
    allow_float: bool = False,
    threads: int | None = None,
) -> None:
    """Export the denoiser of an artifact as one graph of integers for all timesteps.

    The graph is opened in the engines that are installed, and the kernel of every quantized product is listed. If one
    fell back to float that is not meant to, nothing is written.

    Args:
        path: quantized artifact.
        output: file ending in .onnx or .xml, or a directory.
        format: one ONNX file with QuantizeLinear and DequantizeLinear, or OpenVINO's IR.
        four_bit: store codes of at most 4 bits in 4 bits; else in 8, for engines without 4-bit integers.
        tokens: length of the context, where the denoiser attends to one; without it, the pipeline's own.
        latents: height and width of the noisy sample, such as [64,96]; without it, the denoiser's own.
        allow_float: write the file although products fell back to float.
        threads: CPU threads; without it, the engines' choice.
    """
    from tcaq_lightning.backends.export import export_artifact

    _at_least(1, tokens=tokens, threads=threads)
    if latents is not None and (len(latents) != 2 or min(latents) < 1):
        raise UserError(f"--latents: expected a height and a width of at least 1, such as [64,96], got {latents}")
    _set_threads(threads)
    size = None if latents is None else (latents[0], latents[1])
    exported = export_artifact(path, output, format, four_bit, tokens, size, allow_float, threads)
    sys.stdout.write("\n".join([*exported.lines, *(f"wrote {file}" for file in exported.files)]) + "\n")


def is_quantized(path: str) -> bool:
    """Whether a model directory holds an artifact: its denoiser's config.json has a `quantization_config`."""
    from tcaq_lightning.models.pipelines import DENOISER_NAMES, shipped

    for name in DENOISER_NAMES:
        file = (shipped(path) or Path(path)) / name / "config.json"
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"expected JSON in {file}, got {error}; write the model again") from error
            return isinstance(content, dict) and "quantization_config" in content
    return False


def open_model(path: str, backend: str = "torch") -> Any:
    """Open an artifact, or a full-precision model, as a pipeline.

    Args:
        path: of the model. backend: of an artifact.

    Raises:
        UserError: there is no such model, or it is of full precision and the backend is another than torch.
    """
    from tcaq_lightning.models.pipelines import open_pipeline

    if is_quantized(path):
        from tcaq_lightning.backends.load import load_quantized

        return load_quantized(path, backend=backend)
    if backend != "torch":
        raise UserError(f"--backend: expected torch for a full-precision model, got {backend}; give an artifact")
    return open_pipeline(path)


def _interface(denoiser: Any) -> dict[str, Any]:
    """What a denoiser takes and gives, as far as its configuration says."""
    keys = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "num_class_embeds")
    shapes = {key: denoiser.config[key] for key in keys if denoiser.config.get(key) is not None}
    return {"class": type(denoiser).__name__, **shapes}


def _sampler(scheduler: str | None, steps: int, eta: float, options: dict[str, Any] | None) -> Any:
    from tcaq_lightning.config import SamplerConfig

    return SamplerConfig(scheduler, steps, eta, options or {})


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")


def _check_writable(file: Path) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output: expected a file that can be written, got {file}; choose another path")


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


@dataclass
class _Advance:
    """Moves a bar: by a number of samples, or to a place in a total that is known only now."""

    by: Callable[[int], None]
    to: Callable[[int, int], None]

    def __call__(self, count: int) -> None:
        self.by(count)


@contextmanager
def _progress(total: int, what: str = "samples") -> Iterator[_Advance]:
    """A bar on stderr; gives what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tcaq_lightning.runtime.distributed.collectives import is_main

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (console.is_terminal and is_main())) as progress:
        task = progress.add_task(what, total=total)
        yield _Advance(
            by=lambda count: progress.advance(task, count),
            to=lambda done, of: progress.update(task, completed=done, total=of),
        )


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit code, as `run_cli` makes it.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["convert"]:  # the original repositories' name, which jsonargparse keeps for a file of options
        arguments = [re.sub(r"^--config(?==|$)", "--architecture", a) for a in arguments]

    def command() -> None:
        commands: list[Callable[..., Any]] = [sample, evaluate, statistics, report, export, convert]
        auto_cli(list(commands), args=arguments, exit_on_error=False, prog="python -m tcaq_lightning")

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(main())
