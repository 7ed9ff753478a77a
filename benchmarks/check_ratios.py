"""Run the short form of every timing script, and compare its ratios with those stored in `benchmarks/ratios.json`.

    make bench                                              # or: python benchmarks/check_ratios.py
    python benchmarks/check_ratios.py --update measured     # store what was measured

Ratios are stored, not seconds or shares of a peak, by kind of device and dtype, since machines differ less in them.
The exit status is 1 if one has fallen by more than `--tolerance`, so that even its largest value over the rounds is
below the stored median times 1 - tolerance; if one that stood above 1 by 10 % or more does not reach 1 in any round,
for then what was made fast is so no longer (nearer to 1 the noise of two rounds is larger than the gain); if nothing
is stored to compare with; or if a script fails. `--update lowest`, given in each of several runs, stores the lowest of
their medians, so that noise alone is no fault; a run that stores finds nothing fallen. Timing cannot tell small losses
from noise: the tests count the samples that pass the network, the rows that are modulated and the programs that are
compiled.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from side_by_side import default_device, default_dtype, markdown_table

from softvq_hf.training.arguments import check_output_dir, parse_args


FOLDER = Path(__file__).parent
STORED = FOLDER / "ratios.json"
SCRIPTS = ("generation", "tokenizer", "training", "data", "scaling", "solvers")


@dataclass(kw_only=True)
class CheckRatiosArguments:
    """Arguments of this script."""

    output_dir: str = field(default="outputs/bench", metadata={"help": "Folder for the results of the scripts."})
    scripts: list[str] = field(default_factory=lambda: list(SCRIPTS), metadata={"help": "Those to run."})
    tolerance: float = field(default=0.25, metadata={"help": "Share by which a ratio may fall, in [0, 1)."})
    update: str | None = field(
        default=None,
        metadata={
            "help": "Store the measured ratios before they are compared, or the lower ones of these and the stored.",
            "choices": ["measured", "lowest"],
        },
    )

    def __post_init__(self) -> None:
        if not self.scripts or not set(self.scripts) <= set(SCRIPTS):
            raise ValueError(f"`--scripts` is {self.scripts}, allowed: some of {list(SCRIPTS)}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`--tolerance` is {self.tolerance}, allowed: numbers from 0 on, below 1.")


def compare(
    measured: dict[str, dict[str, float]], stored: dict[str, float], tolerance: float
) -> tuple[list[list[Any]], list[str]]:
    """
    Compare ratios.

    Args:
        measured (`dict`): By name, the ratio's "median", "min" and "max".
        stored (`dict` of `str` to `float`): Medians by name.
        tolerance (`float`): See the head of this file.

    Returns:
        `tuple`: rows of a table, and what is wrong: ratios that have fallen, or that are missing on one side.
    """
    rows, faults = [], []
    for name, ratio in measured.items():
        before = stored.get(name)
        rows.append([name, f"{ratio['median']:.3g}", "nothing" if before is None else f"{before:.3g}"])
        if before is None:
            faults.append(f"{name} is not stored. `--update lowest` stores it.")
        elif ratio["max"] < max(before * (1 - tolerance), 1.0 if before >= 1.1 else 0.0):
            faults.append(f"{name} has fallen from {before:.3g} to {ratio['median']:.3g}, at most {ratio['max']:.3g}.")
    faults += [f"{name} was not measured." for name in stored if name not in measured]
    return rows, faults


def main(args: CheckRatiosArguments) -> int:
    """Run, compare or store, and return the exit status."""
    check_output_dir(args.output_dir)
    device = default_device()
    kind = f"{device} {default_dtype(device)}"
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}
    all_rows, all_faults = [], []
    for script in args.scripts:
        command = [sys.executable, str(FOLDER / f"{script}.py"), "--short", "--output_dir", args.output_dir]
        exit_status = subprocess.run(command).returncode
        if exit_status != 0:  # the others are measured all the same
            all_faults.append(f"{script} ended with exit status {exit_status}.")
            continue
        report = json.loads((Path(args.output_dir) / f"{script}.json").read_text(encoding="utf-8"))
        if args.update is not None:
            medians = {name: round(ratio["median"], 3) for name, ratio in report["ratios"].items()}
            if args.update == "lowest":
                earlier = stored.get(kind, {}).get(script, {})
                medians = {name: min(median, earlier.get(name, median)) for name, median in medians.items()}
            stored.setdefault(kind, {})[script] = medians
        before = stored.get(kind, {}).get(script)
        if before is None:
            all_faults.append(f"{script}: no ratios are stored for {kind!r}. `--update lowest` stores those of now.")
            faults = []
        else:
            rows, faults = compare(report["ratios"], before, args.tolerance)
            all_rows += [[script, *row] for row in rows]
        all_faults += [f"{script}: {fault}" for fault in faults]
    print(markdown_table(["script", "ratio", "measured", f"stored for {kind}"], all_rows))
    if args.update is not None:
        STORED.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for fault in all_faults:
        print(fault, file=sys.stderr)
    return int(len(all_faults) > 0)


if __name__ == "__main__":
    sys.exit(main(parse_args(CheckRatiosArguments)))
