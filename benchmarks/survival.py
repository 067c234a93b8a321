"""What the program survives: kills, file operations that fail, bad input. A table of what its tests did to it.

    python -m benchmarks.survival [--slow]

Runs those tests and counts. A single loss would be a test that fails, and with it this command.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common import markdown_table, write_result

ROOT = Path(__file__).parent.parent
TESTS = {
    "test_kill": "runs killed over and over, against calm ones",
    "test_files": "folders written while an operation fails, and damaged ones",
    "test_disk": "files on disks that refuse, move little at a time, or give back other bytes",
    "test_checkpoint": "checkpoints written and deleted while an operation fails, and damaged ones",
    "test_saver": "disks that refuse, and saving beside the training",
    "test_real_disks": "full disks and missing permissions, as the system makes them",
    "test_stop": "signals, in steps, evaluations and saves",
    "test_nonfinite": "losses and gradients that are not finite",
    "test_bad_input": "bad files, flags, checkpoints, and readers under random bytes",
}


def main() -> None:
    """Run the tests, count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also 200 kills of one run, and 10 at 124M parameters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/{name}.py" for name in TESTS]
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
    rows += [[f"tests: {what}", str(passed[name])] for name, what in TESTS.items()]
    rows += [["tests skipped", str(skipped)], ["tests in which something was lost", str(failed)]]
    figures = {"slow": options.slow, "counts": counts, "passed": passed, "skipped": skipped, "failed": failed}
    write_result("survival", figures, markdown_table(["what was done to runs", "number"], rows))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
