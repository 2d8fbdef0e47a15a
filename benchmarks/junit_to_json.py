"""pytest's JUnit report as JSON: counts, and what failed. `python benchmarks/junit_to_json.py report.xml`"""

from __future__ import annotations

import json
import platform
import sys
from xml.etree import ElementTree

import torch

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
assert suite is not None
failed = {
    f"{case.get('classname')}::{case.get('name')}": (fault.get("message") or "")[:500]
    for case in suite.iter("testcase")
    for fault in [*case.iter("failure"), *case.iter("error")]
}
print(
    json.dumps(
        {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **{name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")},
            "seconds": float(suite.get("time", 0)),
            "failed": failed,
        },
        indent=1,
    )
)
