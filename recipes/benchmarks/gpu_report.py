"""Join what the steps of `gpu.sh` wrote into one JSON file, with the hardware and the versions.

python recipes/benchmarks/gpu_report.py runs/gpu
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    folder = Path(sys.argv[1])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {"gpu": gpu, "machine": platform.machine(), "torch": torch.__version__, "commit": commit or None}
    report |= {"cuda": torch.version.cuda, "transformers": transformers.__version__}
    steps = {"encoders": "inputs/encoders.json", "minilm": "minilm/metrics.json"}
    steps |= {name: f"{name}.json" for name in ("losses", "loss", "loss_1300k", "step")}
    report |= {name: json.loads(path.read_text()) for name, file in steps.items() if (path := folder / file).exists()}
    report["steps"] = dict(line.split() for line in (folder / "steps.txt").read_text().splitlines())  # exit codes
    (folder / "gpu.json").write_text(json.dumps(report, indent=1))
    failed = [name for name, code in report["steps"].items() if code != "0"]
    print(f"wrote {folder / 'gpu.json'}; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
