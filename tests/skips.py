"""python -m tests.skips REPORT.xml EXCUSE...: fail where a test was skipped without one of the excuses named.

An excuse is the first word of the skip's reason: `gpu`, `shared-data` or `extra`, as in `pytest.skip("gpu: needs CUDA")`.
"""

import sys
import xml.etree.ElementTree as ElementTree


def unexcused(report: str, excuses: list[str]) -> list[str]:
    """Skipped tests of a JUnit report with their reasons, but for the excused."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if reason.split(":")[0] not in excuses:
                found.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    return found


if __name__ == "__main__":
    left = unexcused(sys.argv[1], sys.argv[2:])
    print("\n".join(f"skipped without an excuse: {line}" for line in left) or "every skipped test has its excuse")
    sys.exit(bool(left))
