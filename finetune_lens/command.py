"""What every command shares: the common options, exit codes, progress, and the output folder.

A command is a plain function with typer annotations and one parameter `common: Common`; `run` replaces that parameter
by the options all commands have. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

import dataclasses
import functools
import inspect
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_lens.errors import GateFailed, InputError
from finetune_lens.files import whole_file
from finetune_lens.prompts import require_template

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.results import Result

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Base model: file, folder, or cached hub id (NAME@REVISION).")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model: file, folder, or cached hub id.")]
OfAdapter = Annotated[
    str | None, typer.Option("--base", help="Of a PEFT adapter: the model it was trained on.", show_default=False)
]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="Tuned model: the same, or a PEFT adapter folder.")]
TunedOrSeveral = Annotated[
    list[str], typer.Argument(metavar="TUNED...", help="Tuned model, or several checkpoints of one run.")
]
Fused = Annotated[bool, typer.Option("--fused", help="Keep fused q/k/v and gate/up in one piece.")]
Orientation = Annotated[
    str, typer.Option(help="GPT-2-style weights: auto (from the shapes), conv1d (in, out), linear (out, in).")
]
Template = Annotated[str, typer.Option(help="Chat template on the prompts: none or each.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Exit 0 although weights with NaN or Inf were left out.")
]
Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="Go on although the trust gate finds this pair unsafe to compare.")
]
MOST_STEPS = 1000  # values of a range


@dataclasses.dataclass(kw_only=True)
class Basic:
    """The options that every command has."""

    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no messages.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    @property
    def progress(self) -> bool:
        """Whether bars are drawn: on a terminal only, so that a log holds lines."""
        return not self.quiet and sys.stderr.isatty()

    def say(self, *words: object) -> None:
        """A message to standard error."""
        if not self.quiet:
            print(*words, file=sys.stderr)


@dataclasses.dataclass(kw_only=True)
class Saved(Basic):
    """The options of everything that leaves a result."""

    out: Annotated[Path | None, typer.Option(help="Output folder.  [default: runs/NAME]", show_default=False)] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite results that are already in the folder.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the figures.")] = True


@dataclasses.dataclass(kw_only=True)
class Common(Saved):
    """The options that every analysis of models has."""

    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU when there is one.")] = "auto"
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N.  [default: all]", show_default=False)] = (
        None
    )
    online: Annotated[bool, typer.Option("--online", help="Ask the hub for what is not cached.")] = False


def _batch_size(text: str) -> int | None:
    """A number, or None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"expected auto or a number from 1 on; found {text!r}")
    return int(text)


@dataclasses.dataclass(kw_only=True)
class Running(Common):
    """The options that every analysis which runs models has."""

    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64; auto: as stored, float32 on a CPU.")
    ] = "auto"
    batch_size: Annotated[
        Any, typer.Option(parser=_batch_size, metavar="N", help="Examples at once, or auto.", show_default="auto")
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(help="config.json (or its folder) of weights that have none beside them.", show_default=False),
    ] = None
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer that is not beside the weights.", show_default=False)
    ] = None

    def pair(self, base: str, tuned: str) -> "ModelPair":
        """Base and tuned, aligned, with a word on how."""
        from finetune_lens.pair import ModelPair

        pair = ModelPair.load(base, tuned, online=self.online, config=self.config, tokenizer=self.tokenizer)
        self.say(pair.alignment.summary())
        return pair

    def model(self, model: str, base: str | None = None) -> "HookedModel":
        """One model, ready to run; a PEFT adapter on its base."""
        from finetune_lens.hooked.loading import as_model

        if base is not None:
            return self.pair(base, model).models(device=self.device, dtype=self.dtype)[1]
        return as_model(
            model, device=self.device, dtype=self.dtype, config=self.config, tokenizer=self.tokenizer,
            online=self.online,
        )  # fmt: skip

    def execution(self) -> dict[str, Any]:
        """What every analysis takes of these."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "progress": self.progress,
        }


@dataclasses.dataclass(kw_only=True)
class Patching(Running):
    """The options of analyses that patch."""

    by: Annotated[
        str | None,
        typer.Option(
            help="The grid, of layer,head,position.  [default: layer,position; of heads layer,head]",
            show_default=False,
        ),
    ] = None
    layers: Annotated[str | None, typer.Option(help="Which, as 0,3-5.  [default: all]", show_default=False)] = None
    heads: Annotated[str | None, typer.Option(help="Which.  [default: all]", show_default=False)] = None
    positions: Annotated[
        str | None, typer.Option(help="Which; -1 is the last.  [default: all]", show_default=False)
    ] = None
    window: Annotated[int, typer.Option(min=1, help="Layers patched together, centred on each.")] = 1
    sets: Annotated[
        Path | None,
        typer.Option(
            help='JSON: named sets of places patched together, {"name": ["blocks.3.attn.hook_z[7]@-1"]}.',
            show_default=False,
        ),
    ] = None
    metric: Annotated[str, typer.Option(help="logit_diff, logprob, prob, reciprocal_rank, accuracy or kl.")] = (
        "logit_diff"
    )
    method: Annotated[str, typer.Option(help="exact, full, attribution, integrated, both.")] = "exact"
    steps: Annotated[int, typer.Option(min=1, help="Of integrated gradients.")] = 10
    align: Annotated[
        str, typer.Option(help="Which positions correspond where prompts differ in length: left, right, or error.")
    ] = "error"
    whole_answer: Annotated[
        bool,
        typer.Option("--whole-answer", help="Score all tokens of the answer together (with --metric logprob)."),
    ] = False
    template: Template = "none"

    def grid(self) -> dict[str, Any]:
        """What to patch and what to read, as the analyses take it."""
        listed = {name: getattr(self, name) for name in ("layers", "heads", "positions")}
        return {name: numbers(text) if text else None for name, text in listed.items()} | {
            "by": self.by.split(",") if self.by else None,
            "window": self.window,
            "metric": self.metric,
            "align": self.align,
        }

    def options(self) -> dict[str, Any]:
        """The rest of what `patch` and `cross_patch` share."""
        require_template(self.template)
        return {
            "sets": read_sets(self.sets),
            "method": self.method,
            "steps": self.steps,
            "whole_answer": self.whole_answer,
        }


def numbers(text: str) -> list[int]:
    """`0,3-5,-1` as [0, 3, 4, 5, -1].

    Raises:
        InputError: not such a list.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise InputError(f"expected numbers such as 0,3-5,-1; found {text!r}")
        first = int(match[1])
        found += [first] if match[2] is None else range(first, int(match[2]) + 1)
    return found


def span(text: str) -> list[float]:
    """`-0.5:1.5:0.5` as [-0.5, 0.0, 0.5, 1.0, 1.5], both ends with it; `0,0.25,1` as it stands.

    The steps are counted in decimals, so that 0 and 1 are exact where they are met.

    Raises:
        InputError: neither a range nor a list, a step that does not lead from one end to the other, or too many.
    """
    pieces = text.split(":")
    try:
        exact = [Decimal(piece.strip()) for piece in (pieces if len(pieces) > 1 else text.split(","))]
    except InvalidOperation:
        exact = []
    if not exact or len(pieces) not in (1, 3) or not all(number.is_finite() for number in exact):
        raise InputError(
            f"expected a range FIRST:LAST:STEP such as -0.5:1.5:0.1, or numbers such as 0,0.5,1; found {text!r}"
        )
    if len(pieces) == 3:
        first, last, step = exact
        if step <= 0 or last < first or (last - first) / step >= MOST_STEPS:
            raise InputError(
                f"expected a range FIRST:LAST:STEP with FIRST ≤ LAST, a step above 0, and at most {MOST_STEPS} values; "
                f"found {text!r}"
            )
        exact = [first + i * step for i in range(int((last - first) / step) + 1)]
        if exact[-1] != last:
            raise InputError(f"steps of {step} lead from {first} to {exact[-1]}, not to {last}; found {text!r}")
    return [float(number) + 0.0 for number in exact]  # + 0.0: no −0


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_sets(path: Path | None) -> dict[str, list[str]] | None:
    """The sets of places in a JSON file.

    Raises:
        InputError: no such file, or something else in it.
    """
    if path is None:
        return None
    sets = read_json(path)
    if not isinstance(sets, dict) or not all(
        isinstance(places, list) and all(isinstance(p, str) for p in places) for places in sets.values()
    ):
        raise InputError(f"{path}: expected an object of names and lists of places")
    return sets


class CheckFailed(Exception):
    """Raised by a command when it ran to its end and a check did not hold: exit code 1."""


def run(*functions: Callable[..., None]) -> None:
    """Run `function` as the command line of its module; of several, each is a subcommand under its own name.

    The parameter `common`, annotated with `Basic` or `Common`, is replaced by the fields of that class. Errors of the
    user's making end in one line on standard error; `--debug` shows the traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for function in functions:
        app.command(name=function.__name__)(_guarded(function))
    name = f"python -m {functions[0].__module__.removesuffix('.__main__')}"
    try:
        code = app(prog_name=name, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's, of options and arguments
            raise
        asked = getattr(error, "ctx", None)
        help_of = asked.command_path if asked else name
        print(f"error: {error.format_message().rstrip('.')}; `{help_of} --help` lists what there is", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with `common` opened up into options, and exceptions turned into exit codes."""
    signature = inspect.signature(function)
    kind = signature.parameters["common"].annotation
    fields = dataclasses.fields(kind)
    own = [p for p in signature.parameters.values() if p.name != "common"]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields
    ]

    @functools.wraps(function)
    def guarded(**options: Any) -> None:
        common = kind(**{f.name: options.pop(f.name) for f in fields})
        interrupted = []

        def interrupt(*_: Any) -> None:
            interrupted.append(True)
            raise KeyboardInterrupt

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, interrupt) if main else None
        try:
            function(**options, common=common)
        except InputError as error:
            if common.debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            if common.debug:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror or error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except (CheckFailed, GateFailed) as failure:
            print(f"check failed: {failure}", file=sys.stderr)
            raise typer.Exit(1) from None
        except BaseException as error:  # compiled code may turn the interrupt that reaches it into an error of its own
            if not interrupted and not isinstance(error, KeyboardInterrupt):
                raise
            print("interrupted; run the same command again to continue", file=sys.stderr)
            raise typer.Exit(130) from None
        finally:
            if main:
                signal.signal(signal.SIGINT, before)

    del guarded.__wrapped__  # else typer would follow it to the signature with `common`
    guarded.__signature__ = signature.replace(parameters=[*own, *shared])
    return guarded


class OutputFolder:
    """`DIR` of a command called `name`: NAME.nc, NAME.csv, run.json, figures/NAME-*.{pdf,png}.

    Bad input leaves nothing behind: the constructor only looks (an existing result is an error unless `force`), `check`
    tries, and the folder is made when there is something to put into it.
    """

    def __init__(self, path: Path | None, name: str, *, force: bool):
        self.name = name
        self.path = Path("runs", name) if path is None else path
        if self.result.exists() and not force:
            raise InputError(f"{self.result} exists and would be overwritten; choose another --out, or pass --force")

    @property
    def result(self) -> Path:
        return self.path / f"{self.name}.nc"

    @property
    def partial(self) -> Path:
        """Where finished chunks wait for the rest."""
        return self.path / f".{self.name}.partial"

    def check(self) -> None:
        """Show that the folder can be made and written to, and leave everything as it was."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        probe = self.path / f".{os.getpid()}-probe"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"cannot write to the output folder {self.path}: {error.strerror}; choose another --out"
            ) from None
        finally:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()

    def write(self, result: "Result") -> None:
        """Save the result, its table and its provenance, each file whole or absent; drop the finished chunks."""
        self.path.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path / f"{self.name}.csv") as path:
            result.to_frame().to_csv(path, index=False)
        self._record(result)
        with whole_file(self.result) as path:
            result.save(path)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _record(self, result: "Result") -> None:
        """Put the provenance under this analysis' name in run.json, beside that of others in the same folder."""
        file = self.path / "run.json"
        try:
            records = json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            records = {}
        with whole_file(file) as path:
            path.write_text(json.dumps(records | {self.name: result.provenance}, indent=1))

    def draw(self, figures: dict[str, Callable[[], Any]]) -> list[Path]:
        """Draw each title → function returning a matplotlib Figure to figures/NAME-title.pdf and .png."""
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        written = []
        (self.path / "figures").mkdir(exist_ok=True)
        for title, make in figures.items():
            figure = make()
            for kind in ("pdf", "png"):
                target = self.path / "figures" / f"{self.name}-{title.replace('_', '-')}.{kind}"
                with whole_file(target) as path:
                    figure.savefig(path, format=kind)
                written.append(target)
            plt.close(figure)
        return written


def finish(
    result: "Result", folder: OutputFolder, common: Common, *beside: "tuple[Result, OutputFolder]", **facts: Any
) -> None:
    """The end of every analysis: save the result, draw its figures, tell what it says (`facts` go into the JSON).

    Results `beside` it have their own files in its folder, and are told after it; in the JSON under their own name.
    """
    records = []
    for one, where in ((result, folder), *beside):
        where.write(one)
        figures = []
        if common.plots:
            from finetune_lens import plots

            figures = where.draw(plots.figures_of(one))
        record = {"kind": where.name, "out": str(where.path), "headline": one.headline()}
        records.append(record | {"figures": [str(p) for p in figures]})
    if common.json:
        record = records[0] | facts | {record["kind"]: record for record in records[1:]}
        print(json.dumps(record, ensure_ascii=False, allow_nan=False))
    else:
        print("\n\n".join(one.summary() for one in (result, *(one for one, _ in beside))))
        drawn = any(record["figures"] for record in records)
        common.say(f"saved in {folder.path}/" + (f"; figures in {folder.path / 'figures'}/" if drawn else ""))


def analyse_weights(
    name: str,
    base: str,
    tuned: str | list[str],
    analysis: Callable[..., "Result"],
    common: Common,
    *,
    fused: bool,
    orientation: str,
    allow_nonfinite: bool,
    beside: "Sequence[tuple[Result, OutputFolder]]" = (),
    **options: Any,
) -> None:
    """The course of every command that compares the weights of two checkpoints: load, analyse, save, draw, tell.

    The analysis may put further results into `beside`, each with its folder.
    """
    folder = OutputFolder(common.out, name, force=common.force)

    from finetune_lens.pair import ModelPair, ModelSeries

    kind = ModelSeries if isinstance(tuned, list) else ModelPair
    running = {}
    if isinstance(common, Running) and kind is ModelPair:
        running = {"config": common.config, "tokenizer": common.tokenizer}
    pair = kind.load(base, tuned, online=common.online, fused=fused, orientation=orientation, **running)
    common.say(pair.alignment.summary())
    folder.check()
    result = analysis(
        pair,
        limit=common.limit,
        device=common.device,
        progress=common.progress,
        partial=folder.partial,
        **options,
    )
    facts = {"alignment": pair.alignment.summary().splitlines(), "excluded": result.provenance["excluded"]}
    finish(result, folder, common, *beside, **facts)
    if result.provenance["excluded"] and not allow_nonfinite:
        raise CheckFailed(
            f"{len(result.provenance['excluded'])} weights hold NaN or Inf and were left out (listed above); "
            "pass --allow-nonfinite to accept that"
        )
