# SPDX-License-Identifier: Apache-2.0
"""Small programs that answer as kubectl, gcloud and Slurm do, and note what they were asked.

A test says how each job fares ("plays": what successive looks find; the last one stays), puts the
programs on PATH with `install`, and reads what was called with `calls`.
"""

import contextlib
import io
import json
import os
import re
import stat
import sys
from pathlib import Path

PROGRAMS = ("kubectl", "gcloud", "sbatch", "sacct", "scancel")


def install(monkeypatch, folder, plays=None, programs=PROGRAMS):
    """Puts the programs first on PATH; `plays` is job name (or its end) to answers."""
    folder.mkdir(exist_ok=True)
    for name in programs:
        path = folder / name
        # -S -I: nothing but the standard library is needed, and a quick start is.
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I {__file__} {name} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    set_plays(folder, plays or {})
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_STATE", str(folder))
    return folder


def here(monkeypatch, folder, plays=None):
    """The same without processes: a call of a program becomes a call of its function."""
    folder.mkdir(exist_ok=True)
    set_plays(folder, plays or {})

    def call(command):
        name, *argv = command
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = answer(folder, name, argv)
        if code:
            # Only where the package is: the programs themselves run without it.
            from flexolmo_jax.jobs.tools import ToolError

            raise ToolError(command, code, err.getvalue())
        return out.getvalue()

    monkeypatch.setattr("flexolmo_jax.jobs.tools.call", call)
    return folder


def set_plays(folder, plays):
    """What the next looks find; forgets how far the last plays got."""
    state = _load(folder)
    _save(folder, {**state, "plays": plays, "at": {}})


def calls(folder, program=""):
    """Argument lists of all calls, of one program if it is named."""
    log = _load(folder)["log"]
    return [argv for argv in log if not program or argv[0] == program]


def _load(folder):
    path = Path(folder) / "state.json"
    empty = {"log": [], "plays": {}, "at": {}, "there": {}, "ran": {}}
    return json.loads(path.read_text()) if path.is_file() else empty


def _save(folder, state):
    (Path(folder) / "state.json").write_text(json.dumps(state))


def next_of(state, name, kind=""):
    """The answer to the next look at a job."""
    key = next((k for k in state["plays"] if name.endswith(k)), None)
    play = state["plays"].get(key, ["done"])
    play = play.get(kind, []) if isinstance(play, dict) else play
    at = state["at"].get(name + kind, 0)
    state["at"][name + kind] = at + 1
    return play[min(at, len(play) - 1)]


def option(argv, name):
    """The value of --name=value."""
    return next((a.split("=", 1)[1] for a in argv if a.startswith(f"--{name}=")), None)


def kubectl(state, argv):
    words = [a for a in argv if not a.startswith("--")]
    if words[0] == "apply":
        text = Path(option(argv, "filename")).read_text()
        name = re.search(r"^  name: (\S+)", text, re.MULTILINE)[1]
        digest = re.search(r"flexolmo/digest: (\S+)", text)[1]
        state["there"][name] = digest
        print(f"jobset.jobset.x-k8s.io/{name} created")
    elif words[0] == "delete":
        state["there"].pop(words[2], None)
    elif words[0] == "get" and words[2] in state["there"]:
        return jobset(words[2], state["there"][words[2]], next_of(state, words[2]))
    return 0


def jobset(name, digest, answer):
    """Prints a JobSet as `kubectl get -o json` does."""
    parts = [
        {"name": "slice", "active": 1, "ready": 0, "succeeded": 0, "failed": 0, "suspended": 0}
    ]
    condition, spec = [], {}
    if answer == "error":
        print("Unable to connect to the server", file=sys.stderr)
        return 1
    if answer == "garbage":
        print("Welcome!")
        return 0
    if answer == "queued":
        condition, spec = [("Suspended", "True")], {"suspend": True}
    elif answer == "running":
        condition, parts[0]["ready"] = [("Suspended", "False")], 1
    elif answer == "restarted":
        parts[0]["ready"] = 1
    elif answer in ("done", "failed"):
        condition = [("Completed" if answer == "done" else "Failed", "True")]
    conditions = [{"type": t, "status": s, "message": f"is {t}"} for t, s in condition]
    status = {"conditions": conditions, "replicatedJobsStatus": parts}
    status["restarts"] = 2 if answer == "restarted" else 0
    meta = {"name": name, "annotations": {"flexolmo/digest": digest}}
    print(json.dumps({"kind": "JobSet", "metadata": meta, "spec": spec, "status": status}))
    return 0


def gcloud(state, argv):
    words = [a for a in argv if not a.startswith("--")]
    verb, name = words[3], words[4]
    if verb == "create":
        state["there"][name] = option(argv, "labels").split("=", 1)[1]
        state["ran"].pop(name, None)
        return 0
    base = name if name in state["there"] else re.sub(r"-\d+$", "", name)
    if base not in state["there"]:
        print(f"ERROR: (gcloud.compute) NOT_FOUND: {name} was not found", file=sys.stderr)
        return 1
    if verb == "describe":
        node = {"labels": {"flexolmo-digest": state["there"][name]}}
        answer = {"state": {"state": next_of(state, name, "machines")}}
        print(json.dumps({**answer, "tpu": {"nodeSpec": [{"node": node}]}}))
    elif verb == "delete":
        del state["there"][name]
        state["ran"].pop(name, None)
    elif verb == "ssh":
        return ssh(state, base, name, option(argv, "command"))
    return 0


def ssh(state, job, node, command):
    """Runs a command on the hosts of a node."""
    if "docker run" in command:
        state["ran"].setdefault(job, []).append(node)
    elif "docker logs" in command:
        print(f"the last line of {node}")
    elif node not in state["ran"].get(job, []):
        print("flexolmo-state absent 0")
    else:
        answer = next_of(state, job, "containers")
        if answer.startswith("exited 75"):
            state["ran"][job].remove(node)
        print("Using ssh batch size of 1.\nflexolmo-state " + answer)
    return 0


def sbatch(state, argv):
    script = Path(argv[-1]).read_text()
    name = re.search(r"--job-name=(\S+)", script)[1]
    number = str(101 + len(state["there"]))
    state["there"][number] = name
    print(number)
    return 0


def sacct(state, argv):
    number = option(argv, "jobs")
    answer = next_of(state, state["there"][number])
    if answer:
        print(answer if "|" in answer else f"{answer}|0:0")
    return 0


def scancel(state, argv):
    return 0


def answer(folder, name, argv):
    """Notes and answers one call; returns the exit code."""
    state = _load(folder)
    state["log"].append([name, *argv])
    code = globals()[name](state, argv)
    _save(folder, state)
    return code


def main():
    return answer(os.environ["FAKE_STATE"], sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
