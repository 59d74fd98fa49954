# SPDX-License-Identifier: Apache-2.0
"""What other projects publish of the things that `flexolmo launch` writes: schemas and options.

`tests/fixtures/launch_facts.json` holds the facts that our manifests and commands touch, no more.
This script makes it from the originals, or with --check says whether it still agrees with them:

  python tests/launch_facts.py --jobset JOBSET_CHECKOUT --kueue KUEUE_CHECKOUT \\
      --slurm SLURM_CHECKOUT [--check]

The options of gcloud and kubectl come from the programs themselves (`--help`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

FACTS = Path(__file__).parent / "fixtures" / "launch_facts.json"
JOBSET_CRD = "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"
KUEUE_KINDS = {
    "ResourceFlavor": "resourceflavors",
    "ClusterQueue": "clusterqueues",
    "LocalQueue": "localqueues",
    "WorkloadPriorityClass": "workloadpriorityclasses",
}
SLURM_PAGES = ("sbatch", "srun", "sacct", "scancel", "squeue")
GCLOUD = ("queued-resources create", "queued-resources describe", "queued-resources delete")
GCLOUD += ("tpu-vm ssh",)
KUBECTL = ("apply", "get", "delete", "logs")
# Rules of a schema that a value can break.
KEPT = ("type", "enum", "pattern", "format", "required", "minimum", "maximum", "minLength")
KEPT += ("maxLength", "minItems", "maxItems", "x-kubernetes-int-or-string")


def trim(schema, value):
    """The part of a CRD's schema that `value` touches, in the words of JSON Schema.

    Kubernetes refuses unknown fields of such types, so additionalProperties becomes false.
    """
    out = {k: schema[k] for k in KEPT if k in schema}
    if out.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if isinstance(value, list):
        parts = [trim(schema["items"], item) for item in value]
        return {**out, "items": join(parts)}
    if not isinstance(value, dict):
        return out
    rest = schema.get("additionalProperties")
    if isinstance(rest, dict):
        return {**out, "additionalProperties": trim(rest, next(iter(value.values()), ""))}
    if "properties" not in schema:
        return out
    unknown = set(value) - set(schema["properties"])
    if unknown:
        raise SystemExit(f"the published schema has no {sorted(unknown)}")
    names = {k: trim(schema["properties"][k], v) for k, v in value.items()}
    return {**out, "properties": names, "additionalProperties": False}


def join(schemas):
    """The union of trimmed schemas of the same node."""
    out = {}
    for schema in schemas:
        for key, value in schema.items():
            if key == "properties":
                both = {**out.get(key, {})}
                for name, sub in value.items():
                    both[name] = join([both[name], sub]) if name in both else sub
                out[key] = both
            elif key in ("items", "additionalProperties") and isinstance(value, dict):
                out[key] = join([out.get(key, {}), value])
            else:
                out[key] = value
    return out


def version(crd, name):
    """The schema of one version of a CRD."""
    (found,) = [v for v in crd["spec"]["versions"] if v["name"] == name]
    return found["schema"]["openAPIV3Schema"]


def read(repository, path):
    """A file of the newest commit of a repository, checked out or not."""
    command = ["git", "-C", str(repository), "show", f"HEAD:{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def crd_facts(text, name, values):
    crd = yaml.safe_load(text)
    schema = version(crd, name)
    # Kubernetes itself checks the metadata; the CRD says only that it is an object.
    bodies = [{k: v for k, v in value.items() if k != "metadata"} for value in values]
    out = join([trim(schema, body) for body in bodies])
    out["properties"]["metadata"] = {"type": "object"}
    return out


def man_options(text):
    text = text.replace("\\-", "-")
    text = re.sub(r"\\f[A-Z]", "", text)
    found = re.findall(r"^(?:-[A-Za-z](?:<[^>]*>)?, )?--([a-z][a-z0-9-]+)", text, re.MULTILINE)
    return sorted(set(found))


def help_options(command, pattern):
    env = {**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    text = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return sorted(set(re.findall(pattern, text, re.MULTILINE)))


def states(slurm):
    text = read(slurm, "doc/html/job_state_codes.shtml")
    return sorted(set(re.findall(r">([A-Z_]{4,})<", text)) - {"JOB_"})


def commit(folder):
    """The newest commit."""
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def gather(jobset, kueue, slurm):
    """All facts, with where each comes from."""
    import launch_samples

    manifests = {
        "JobSet": crd_facts(read(jobset, JOBSET_CRD), "v1alpha2", launch_samples.jobsets())
    }
    for kind, plural in KUEUE_KINDS.items():
        text = read(kueue, f"config/components/crd/bases/kueue.x-k8s.io_{plural}.yaml")
        values = [v for v in launch_samples.cluster_objects() if v["kind"] == kind]
        manifests[kind] = crd_facts(text, "v1beta2", values)
    pages = {n: man_options(read(slurm, f"doc/man/man1/{n}.1")) for n in SLURM_PAGES}
    wide = r"--([a-z][a-z0-9-]+)"
    clouds = {}
    for c in GCLOUD:
        command = ["gcloud", "compute", "tpus", *c.split(), "--help"]
        clouds[f"gcloud compute tpus {c}"] = help_options(command, wide)
    kubes = {
        f"kubectl {c}": sorted(
            set(help_options(["kubectl", c, "--help"], r"^ +(?:-[a-zA-Z], )?--([a-z-]+)="))
            | set(help_options(["kubectl", "options"], r"^ +(?:-[a-zA-Z], )?--([a-z-]+)="))
        )
        for c in KUBECTL
    }
    return {
        "sources": {
            "jobset": f"kubernetes-sigs/jobset {commit(jobset)}, v1alpha2",
            "kueue": f"kubernetes-sigs/kueue {commit(kueue)}, v1beta2",
            "slurm": f"SchedMD/slurm {commit(slurm)}",
            "gcloud": help_options(["gcloud", "version"], r"Google Cloud SDK (\S+)")[0],
            "kubectl": help_options(["kubectl", "version", "--client"], r"Client Version: (\S+)")[
                0
            ],
        },
        "schemas": manifests,
        "options": {**pages, **clouds, **kubes},
        "slurm_states": states(slurm),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("jobset", "kueue", "slurm"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    facts = gather(args.jobset, args.kueue, args.slurm)
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    if not args.check:
        FACTS.write_text(text)
        return 0
    same = json.loads(FACTS.read_text()) == facts
    print("the facts agree" if same else "the facts differ from the originals")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
