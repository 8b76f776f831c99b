"""Says whether pip finds a CPU build of a version of torch on this machine's disk.

    python .ci/torch_at_hand.py 2.10.0

Exits 0 if so, else prints the reason and exits 1. Only local sources of pip's configuration are
asked (folders of `find-links`, `file:` indexes), so nothing is fetched. A build for CUDA does not
count: its libraries take 5 GB, and minutes to install even from this disk.
"""

import ast
import json
import os
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SOURCES = ("find-links", "index-url", "extra-index-url")


def local_sources() -> dict[str, list[str]]:
    """By option of pip: the folders and `file:` indexes that its configuration names."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {option: [] for option in SOURCES}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        if option in found:
            places = str(ast.literal_eval(value)).split()
            local = [one for one in places if one.startswith("file:") or os.path.isdir(one)]
            found[option] += [one for one in local if one not in found[option]]
    return found


def report_on(version: str) -> dict | None:
    """pip's report on the wheel that it would install from local sources; None without one."""
    sources = local_sources()
    options = [f"--find-links={folder}" for folder in sources["find-links"]]
    indexes = sources["index-url"] + sources["extra-index-url"]
    options += [f"--extra-index-url={index}" for index in indexes[1:]]
    options += [f"--index-url={indexes[0]}"] if indexes else ["--no-index"]
    # Without the configuration, whose other indexes are on the network.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    dry = [*PIP, "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    done = subprocess.run(
        [*dry, "--only-binary=:all:", "--report=-", *options, f"torch=={version}"],
        capture_output=True,
        text=True,
        env=env | {"PIP_CONFIG_FILE": os.devnull},
        check=False,
    )
    return json.loads(done.stdout)["install"][0] if done.returncode == 0 else None


def main(version: str) -> int:
    """The exit status; a reason is printed."""
    found = report_on(version)
    if found is None:
        print(f"torch {version} is not on this machine's disk: pip would have to fetch it")
        return 1
    if any("nvidia" in one for one in found["metadata"].get("requires_dist", ())):
        print(f"torch {version} is on this machine's disk as a CUDA build only (5 GB to install)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
