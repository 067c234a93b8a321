"""Counts the faults that the tests inject: kills, failing file operations, bad input.

    python -m benchmarks.survival [--slow] [--tests io/test_atomic ...]

Runs those tests and writes a table. If a test fails, so does this command.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common import benchmark_parser, markdown_table, write_result

ROOT = Path(__file__).parent.parent
TESTS = {
    "integration/test_kill": "runs that are killed repeatedly, compared with undisturbed runs",
    "io/test_atomic": "directories written while an operation fails, and damaged ones",
    "checkpoint/test_store": "checkpoints written and deleted while an operation fails, and damaged ones",
    "checkpoint/test_async_writer": "disks that fail or change bytes, and saving in the background",
    "integration/test_real_disks": "real full disks and missing permissions",
    "train/test_signals": "signals, in steps, evaluations and saves",
    "train/test_nonfinite": "non-finite losses and gradients",
    "integration/test_bad_input": "bad files, flags, checkpoints, and readers under random bytes",
    "integration/test_run_directory": "run directories moved, deleted and rearranged during a run",
    "integration/test_run_directory_fuzz": "run directories whose files are changed or replaced at random",
}


def main() -> None:
    """Run the tests, count, and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--slow", action="store_true", help="also 200 kills of one run, and 10 at 124M parameters")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="only these (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/{name}.py" for name in options.tests]
        marks = ["-m", "slow or not slow"] if options.slow else []
        command = [sys.executable, "-m", "pytest", "-q", *files, *marks, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed, counts = Counter[str](), Counter[str]()
    for case in cases:
        if case.find("failure") is None and case.find("error") is None and case.find("skipped") is None:
            passed[case.attrib["classname"].rpartition(".")[2]] += 1
        for entry in case.iter("property"):
            counts[entry.attrib["name"]] += int(entry.attrib["value"])
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    rows = [[name, str(number)] for name, number in counts.items()]
    rows += [[f"tests: {what}", str(passed[Path(name).name])] for name, what in TESTS.items() if name in options.tests]
    rows += [["tests skipped", str(skipped)], ["tests failed", str(failed)]]
    figures = {"slow": options.slow, "counts": counts, "passed": passed, "skipped": skipped, "failed": failed}
    write_result(options.output, "survival", figures, markdown_table(["fault", "number"], rows))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
