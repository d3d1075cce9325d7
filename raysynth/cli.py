"""The command line. Typer alone is imported here; every command loads what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Recipe = Annotated[
    Path, typer.Argument(help="A recipe, for example jobs/recipes/phantom_demo.yaml")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

app = typer.Typer(
    name="raysynth",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Synthetic, labelled lung CT, made and judged on a Ray cluster. Research use only.",
)


@app.command()
def demo(
    lidc: Annotated[Path | None, typer.Option(help="A folder of LIDC-IDRI DICOM series.")] = None,
    work_dir: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("runs"),
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nobody changes it
) -> None:
    """Run the whole main job: scans in, a judged synthetic data set out."""
    from raysynth.demo import run_demo

    summary = run_demo(work_dir, lidc, overrides)
    print(f"report   {summary.report}")
    print(f"texture  {summary.texture}")
    print(f"summary  {summary.path}")


def _add_stage(verb: str, help_text: str) -> None:
    """Makes the command of one stage: they all take a recipe and the same options."""

    def command(
        recipe: Recipe,
        overrides: Overrides = [],  # noqa: B006
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from raysynth.config import load_recipe

        config = load_recipe(recipe, overrides)
        if dry_run:
            print(config.model_dump_json(indent=2))
            return
        from raysynth import stages

        result = getattr(stages, verb)(config)
        _show(result, as_json)
        if result.get("verdict") == "failed":
            raise typer.Exit(3)

    app.command(verb, help=help_text)(command)


for _verb, _help_text in {
    "ingest": "Read scans into the store.",
    "shard": "Cut the recipe's sample set from the stored volumes.",
    "encode": "Encode the sample set with the recipe's autoencoder.",
    "train": "Fit the recipe's model; ends in a bundle.",
    "synthesize": "Draw synthetic, labelled samples into the store.",
    "evaluate": "Judge the synthetic samples against held-out real ones; write the report.",
    "audit": "Look for copies of training samples; exit 3 if the run must not leave.",
    "downstream": "Train networks with and without the synthetic samples: do these help?",
}.items():
    _add_stage(_verb, _help_text)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Two or more recipes of one sample set.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train, draw and judge several recipes; write one table with pictures."""
    from raysynth import stages
    from raysynth.config import load_recipe

    found = stages.compare([load_recipe(recipe, overrides) for recipe in recipes])
    if as_json:
        _show(found, as_json)
        return
    for verdict in found["verdicts"]:
        print(verdict)
    print(f"page     {found['page']}")
    print(f"figures  {found['path']}")


@app.command()
def export(
    recipe: Recipe,
    to: Annotated[Path, typer.Option(help="A new folder for the files.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format", help="nifti, dicom, nnunet, png, zarr, or the model: bundle, diffusers"
        ),
    ] = "nifti",
    without_audit: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Why it may leave unaudited; recorded in all files."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write the samples, or their model, for others; exit 3 without a passing audit of the run."""
    from raysynth import stages
    from raysynth.config import load_recipe

    config = load_recipe(recipe, overrides)
    _show(stages.export(config, to, file_format, without_audit), as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="An exported file, or a folder of them.")],
    as_json: Json = False,
) -> None:
    """Tell which files are valid, altered or unmarked; exit 3 unless all are valid."""
    from raysynth import stages

    found = stages.verify(path)
    if as_json:
        _show(found, as_json)
    else:
        for one in found["flawed"]:
            print(f"{one['verdict']:9}{one['path']}: {one['reason']}")
        print(f"valid    {found['valid']} of {found['checked']}")
    if found["flawed"]:
        raise typer.Exit(3)


@app.command("reader-study")
def reader_study(
    answers: Annotated[
        Path,
        typer.Argument(help="CSV: reader, item, truth, answer (real or synthetic), rating, repeat"),
    ],
    as_json: Json = False,
) -> None:
    """Say whether readers can tell synthetic images from real ones, or whether that is open."""
    from dataclasses import asdict

    from raysynth.evaluation.reader_study import reader_study as run

    found = run(answers)
    if as_json:
        _show(asdict(found), as_json)
        return
    for name, given in {**found.readers, "all readers": found.pooled}.items():
        print(
            f"{name:16} {given.share:.3f} right of {given.answers} {_range(given.interval)}, d' "
            f"{given.d_prime.value:.2f} {_range(given.d_prime.interval)}"
        )
    if found.between_readers is not None:
        print(f"{'between readers':16} kappa {found.between_readers:.2f}")
    for name, again in found.within_reader.items():
        print(f"{name + ', repeated':16} {again.agreed:.2f} of {again.items}, {again.kappa:.2f}")
    if found.ratings is not None:
        print(f"{'ratings':16} {found.ratings.method}: p {found.ratings.p:.3g}")
    for sentence in found.sentences:
        print(sentence)


@app.command()
def inspect(
    store: Annotated[str, typer.Argument(help="Local path or s3:// URL of a store.")],
    page: Annotated[Path | None, typer.Option(help="Also write pictures to this file.")] = None,
    full: Annotated[bool, typer.Option(help="Read every shard, not the first and last.")] = False,
    as_json: Json = False,
) -> None:
    """Check a store against the schema and show what is in it."""
    from dataclasses import asdict

    from raysynth.data.inspect import inspect_store

    found = inspect_store(store, page, full=full)
    _show(asdict(found), as_json)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def serve(
    recipe: Recipe,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Draw samples over HTTP with the recipe's bundle, until interrupted."""
    from raysynth.config import load_recipe
    from raysynth.serving.app import serve_here

    serve_here(load_recipe(recipe, overrides), host, port)


@app.command()
def token(
    recipe: Recipe,
    owner: Annotated[str, typer.Option(help="Who will use it; an old token of theirs ends.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="draw, batch, metrics, store or study; repeat it. None: all."),
    ] = None,
    requests_per_minute: Annotated[int, typer.Option(min=1)] = 6000,
    max_unfinished: Annotated[int, typer.Option(min=1, help="Samples under way at a time.")] = 256,
    voxels_per_hour: Annotated[int, typer.Option(min=1)] = 100_000_000_000,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Make a token for the service of a recipe; it is told this once."""
    from raysynth.config import load_recipe
    from raysynth.errors import InputError
    from raysynth.serving.tokens import FOLDER, SCOPES, Grant, add_token

    scopes = tuple(scope or SCOPES)
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise InputError(f"--scope {unknown[0]}: give {', '.join(SCOPES)}")
    grant = Grant(
        scopes=scopes,
        requests_per_minute=requests_per_minute,
        max_unfinished=max_unfinished,
        voxels_per_hour=voxels_per_hour,
    )
    print(add_token(load_recipe(recipe, overrides).work_dir / FOLDER, owner, grant))


@app.command()
def plan(
    recipe: Recipe,
    hardware: Annotated[
        Path | None,
        typer.Option(help="A file of cluster/hardware; else this machine takes a few steps."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Say what a recipe will take: memory, time, bytes, money, and what holds it up."""
    from dataclasses import asdict

    from raysynth.config import load_recipe
    from raysynth.config.hardware import load_hardware
    from raysynth.planning.here import measure_here
    from raysynth.planning.plan import find_autoencoder
    from raysynth.planning.plan import plan as make_plan

    config = load_recipe(recipe, overrides)
    cluster = None if hardware is None else load_hardware(hardware)
    autoencoder = find_autoencoder(config.absolute(), recipe.parent)
    if cluster is None:
        cluster = measure_here(config, autoencoder)
    made = make_plan(config, cluster, autoencoder)
    if as_json:
        _show({**asdict(made), "cluster": cluster.model_dump()}, as_json)
    else:
        print(f"{made.recipe} on {made.hardware}: {cluster.num_gpus} x {cluster.gpu}")
        for name, part in made.parts.items():
            print(f"{name}, held up by {part.bottleneck}")
            for line in part.lines():
                print(line)
        for line in made.advice:
            print(f"advice: {line}")
    if not made.fits:
        raise typer.Exit(2)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="Also check its folders and what it wants.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the cluster's head; else RAY_ADDRESS, else here.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Examine a cluster before a run: is it fit, and closed to strangers?"""
    from dataclasses import asdict

    from raysynth.config import load_recipe
    from raysynth.doctor import doctor as examine

    config = None if recipe is None else load_recipe(recipe, overrides)
    found = examine(config, address)
    if as_json:
        _show({"findings": [asdict(one) for one in found]}, as_json)
    else:
        for one in found:
            print(f"{'fine ' if one.is_fine else 'NOT  '} {one.check:14} {one.found}")
            if one.advice:
                print(f"{'':21}{one.advice}")
    if not all(one.is_fine for one in found):
        raise typer.Exit(1)


def _range(interval: tuple[float, float]) -> str:
    return "[{:.3f}, {:.3f}]".format(*interval)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(result, default=str))
    else:
        _print(result)


def _print(result: dict[str, Any], indent: str = "") -> None:
    """Fields a line each, what belongs to one of them below it; nothing of what is not there."""
    for name, value in result.items():
        if value is None or value == {}:
            continue
        title = f"{indent}{name:16}"
        if isinstance(value, dict):
            print(title.rstrip())
            _print(value, indent + "  ")
        elif isinstance(value, list | tuple):
            print(f"{title} {len(value)}")
            for entry in value:
                words = entry.values() if isinstance(entry, dict) else [entry]
                print(f"{indent}  {'  '.join(map(str, words))}")
        else:
            print(f"{title} {f'{value:.4g}' if isinstance(value, float) else value}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input, 3 refused by policy (the one-line reason is
        the last line on stderr).
    """
    from raysynth.errors import RaysynthError

    try:
        return app(arguments, standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except OSError as error:  # a full disk, a folder without permission
        print(f"raysynth: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors; their class is private
            print(f"raysynth: {error.format_message()}", file=sys.stderr)
            return 2
        # Ray hands on what a task raised inside an error of its own.
        cause = getattr(error, "cause", error)
        if type(cause).__module__.startswith("icechunk"):  # a full disk, a bucket out of reach
            print(f"raysynth: the store: {str(cause).splitlines()[0].strip()}", file=sys.stderr)
            return 1
        if not isinstance(cause, RaysynthError):
            raise
        print(f"raysynth: {cause}", file=sys.stderr)
        return cause.exit_code
