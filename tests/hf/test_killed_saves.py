"""A save killed at any moment leaves the old checkpoint, the new one, or one that our next load or save completes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from checkout import SUPPORT
from saved_folders import MODELS, NEW, OLD, SHARDS, loads_as, same, stock_load

import ummrm
from ummrm.hf import replacing


@pytest.fixture(scope="module")
def saver():
    """A function that sends one request to saving_child.py and hands out its answers."""
    script = SUPPORT / "saving_child.py"
    server = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(folder, die_at, merged):
        shards = SHARDS[NEW, merged]
        request = {"folder": str(folder), "die_at": die_at, "seed": NEW, "merged": merged, "shards": shards}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return (line.split()[1] for line in server.stdout if line.startswith(("RESULT", "STOPPED")))

    yield run
    server.stdin.close()
    assert server.wait(60) == 0


@pytest.fixture
def quick_folder():
    """A folder in memory where the system has such a place: what a killed process leaves does not hang on the disk."""
    memory = "/dev/shm"
    root = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    yield Path(root)
    shutil.rmtree(root)


def names_below(folder):
    """Names and sizes below a folder, without what is random in them."""
    for path in folder.rglob("*"):
        name = re.sub(r"(\.ummrm-save-)[^/]*", r"\1", path.relative_to(folder).as_posix())
        yield name, path.stat().st_size if path.is_file() and path.name != "lock" else None


class Trial:
    """One killed save after another, each on the same ground, looked at and then mended by a load and by a save."""

    def __init__(self, root, merged, overwrite):
        self.ground, self.folder, self.copy = root / "ground", root / "model", root / "copy"
        self.old, self.new = MODELS[OLD, merged] if overwrite else None, MODELS[NEW, merged]
        self.ground.mkdir()
        if overwrite:
            ummrm.save_pretrained(self.old, self.ground, max_shard_size=SHARDS[OLD, merged])
        (self.ground / "tokenizer.json").write_text("{}")
        self.found, self.seen, self.mended = [], {}, set()

    def reset(self):
        shutil.copytree(self.ground, self.folder)

    def look(self, folder):
        """What a reader that knows nothing of interrupted saves finds: old, new or neither; never anything else."""
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        key = hash(tuple(sorted(files.items())))
        if key not in self.seen:
            plain = self.classify(stock_load(folder))
            told = self.classify(stock_load(folder, config=self.new.config))
            assert told in (plain, "neither") or plain == "neither"
            self.seen[key] = plain
        return self.seen[key]

    def classify(self, state):
        if state is None:
            return "neither"
        found = [name for name, model in (("old", self.old), ("new", self.new)) if model and same(state, model)]
        assert found, "a mixture of two models loads"
        return found[0]

    def check(self, step):
        """Looks at the folder of a killed save, mends it by what a load does first, and a copy by the next save."""
        found = self.look(self.folder)
        self.found.append(found)
        state = frozenset(names_below(self.folder)), found
        if state in self.mended:  # nothing has moved since the step before
            shutil.rmtree(self.folder)
            return
        self.mended.add(state)
        shutil.copytree(self.folder, self.copy)
        announced = (self.folder / replacing.PENDING).exists()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            replacing.settle(self.folder)
        said = [str(w.message) for w in caught if "was interrupted" in str(w.message)]
        assert len(said) == (announced and found != "new"), (step, said)
        lost = found == "neither" and not announced  # a first save that came to nothing
        assert self.look(self.folder) == ("neither" if lost else found.replace("neither", "new")), step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ummrm.save_pretrained(self.new, self.copy)
        names = {"config.json", "model.safetensors", "tokenizer.json"} | ({"README.md"} & set(os.listdir(self.copy)))
        assert self.look(self.copy) == "new" and set(os.listdir(self.copy)) == names, step
        for folder in (self.folder, self.copy):
            assert (folder / "tokenizer.json").read_text() == "{}"
            shutil.rmtree(folder)


@pytest.mark.parametrize(("merged", "overwrite"), [(False, True), (True, True), (False, False)])
def test_kill_9_at_every_step_of_a_save(saver, merged, overwrite, quick_folder):
    trial = Trial(quick_folder, merged, overwrite)
    trial.reset()
    while (answer := next(saver(trial.folder, len(trial.found) + 1, merged))) == "killed":
        trial.check(len(trial.found) + 1)
        trial.reset()
    assert int(answer) == len(trial.found) > 30, answer
    order = ["old", "neither", "new"] if overwrite else ["neither", "new"]
    assert list(dict.fromkeys(trial.found)) == order and trial.found == sorted(trial.found, key=order.index)
    assert loads_as(trial.folder, trial.new)
    assert not [name for name in os.listdir(trial.folder) if name.startswith(".")]
    assert {p.name for p in trial.folder.glob("*.safetensors")} == set(
        json.loads((trial.folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    ), "no shard of the old checkpoint stays"


CALLS = "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,fsync,fdatasync,write,pwrite64,ftruncate,chmod"


@pytest.mark.full
@pytest.mark.parametrize("merged", [False, True], ids=["moe", "merged"])
def test_kill_9_at_every_system_call_of_a_save(saver, merged, quick_folder, tmp_path):
    """As above, but at the calls that the system sees, native writes included; strace finds them and kills there."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trial = Trial(quick_folder, merged, overwrite=True)

    def traced(*options):
        """Saves under strace; its log."""
        log = tmp_path / "trace"
        answers = saver(trial.folder, 0, merged)
        pid = int(next(answers))
        tracer = subprocess.Popen(["strace", "-p", str(pid), "-o", log, *options], stderr=subprocess.PIPE, text=True)
        said = tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        answer = next(answers)
        tracer.wait(60)
        if "attached" not in said:
            pytest.skip(f"this system lets nobody trace a process: {said.strip()}")
        return answer, log.read_text()

    trial.reset()
    _, log = traced("-e", f"trace={CALLS}")
    assert loads_as(trial.folder, trial.new)
    shutil.rmtree(trial.folder)
    counts = {call: log.count(f"\n{call}(") + log.startswith(f"{call}(") for call in CALLS.split(",")}
    assert counts["rename"] > 5 and counts["write"] > 5 and counts["fsync"] > 10, counts
    for call, count in counts.items():
        for n in range(1, count + 1):
            trial.reset()
            answer, _ = traced("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}")
            if answer != "killed":  # the last write is the child's answer
                assert call == "write" and n == count
                shutil.rmtree(trial.folder)
                continue
            trial.check(f"{call} {n}")
    assert set(trial.found) == {"old", "neither", "new"}
