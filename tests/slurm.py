"""A real Slurm of two nodes on this machine, for tests that run as root: Debian's slurmctld, slurmd and munged.

Each node has a network and a host name of its own (namespaces joined by a bridge), as two machines would. Where
namespaces are refused, both slurmd run on this host and `namespaces` is False: jobs of several nodes then share ports.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_ports

NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
CONTROLLER = "10.77.0.254"
CONF = """
ClusterName=degflow
FirstJobId={first_job}
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
UnkillableStepTimeout=120
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


class Slurm:
    """A running Slurm; as a context manager it ends every process that it started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.controller: list[str] = []  # prefix that runs a command where slurmctld runs
        self.hosts: dict[str, list[str]] = {name: [] for name in NODES}
        self.namespaces = _namespaces_work()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.first_job = 1000 + secrets.randbelow(1_000_000)  # a job's number names its files in /tmp

    def __enter__(self):
        if missing := [name for name in ("slurmctld", "slurmd", "munged", "ip") if not shutil.which(name)]:
            raise FileNotFoundError(f"{missing}: apt-get install slurm-wlm slurm-client munge iproute2")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        # With namespaces, killing the first daemon kills every process in its process namespace. Without them, the
        # processes that slurmd started are found by our slurm.conf in their environment.
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()
        for pid in _processes_of(str(self.folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for job in range(self.first_job, self.first_job + 100):
            shutil.rmtree(f"/tmp/degflow-ray-{job}", ignore_errors=True)

    def run(self, *words, check=True, timeout=60):
        """Run a command where slurmctld runs; returns what it prints."""
        done = subprocess.run(
            [*self.controller, *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise subprocess.SubprocessError(f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words, cwd):
        """Sbatch; returns the job's number."""
        return int(self.run("env", f"--chdir={cwd}", "sbatch", "--parsable", *words))

    def show(self, job):
        """What `scontrol show job` says: a dict of its fields."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait(self, job, seconds=900):
        """Wait for the job's end; returns its fields."""
        return self.until(
            lambda: (
                fields if (fields := self.show(job))["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") else None
            ),
            f"job {job} to end",
            seconds,
        )

    def until(self, condition, what, seconds=900):
        """Poll until the condition returns something true; returns that."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}\n{self.run('squeue', '--long')}{self.logs()}")
            time.sleep(0.2)
        return found

    def logs(self):
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"spool.{name}").mkdir()
        if self.namespaces:
            self._make_network()
            controller, ports = f"ctl({CONTROLLER})", [6817, 6818, 6818]
            nodes = [f"NodeName={name} NodeAddr={address} Port=6818" for name, address in NODES.items()]
        else:
            ports = free_ports(3)
            controller = f"{socket.gethostname()}(127.0.0.1)"
            nodes = [
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port}"
                for name, port in zip(NODES, ports[1:], strict=True)
            ]
        conf = CONF.format(
            folder=self.folder,
            controller=controller,
            ports=ports,
            first_job=self.first_job,
            nodes="\n".join(f"{node} CPUs=2 RealMemory=6000 State=UNKNOWN" for node in nodes),
        )
        (self.folder / "slurm.conf").write_text(conf)
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon(*self.controller, "munged", "--foreground", "--force", f"--key-file={key}", *files)
        self.until((self.folder / "munge.socket").exists, "munged", 30)
        self._daemon(*self.controller, "slurmctld", "-D", "-c", "-i")
        for name, host in self.hosts.items():
            self._daemon(*host, "slurmd", "-D", "-N", name)
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", "idle nodes")

    def _daemon(self, *words):
        with (self.folder / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *words],  # they end with pytest, even if it is killed
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.daemons.append(daemon)
        return daemon

    def _make_network(self):
        """A network separate from this machine's: controller and two nodes on one bridge."""
        kinds = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        reaper = "while :; do sleep 3600 & wait $!; done"  # the first process of a namespace inherits orphans
        outer = self._daemon("unshare", *kinds, "bash", "-c", reaper).pid
        first = Path(f"/proc/{outer}/task/{outer}/children")
        inner = self.until(lambda: first.read_text().strip(), "namespaces", 30)
        self.controller = ["nsenter", "--target", inner, "--net", "--uts", "--mount", "--pid", "--"]
        files = {
            "hosts": "".join(f"{address} {name}\n" for name, address in {**NODES, "ctl": CONTROLLER}.items()),
            "resolv.conf": "nameserver 127.0.0.1\n",  # refuses at once; one out of reach would cost minutes
        }
        for name, text in files.items():
            (self.folder / name).write_text("127.0.0.1 localhost\n" + text if name == "hosts" else text)
            self.run("mount", "--bind", self.folder / name, f"/etc/{name}")
        self.run("hostname", "ctl")
        self.run("sh", "-ec", f"ip link set lo up; ip link add br0 up type bridge; ip addr add {CONTROLLER}/24 dev br0")
        for name, address in NODES.items():
            file = self.folder / f"{name}.pid"
            self._daemon(
                *self.controller, "unshare", "--net", "--uts", "sh", "-c", f"echo $$ >{file}; exec sleep infinity"
            )
            pid = self.until(lambda file=file: file.exists() and file.read_text().strip(), "namespaces", 30)
            self.hosts[name] = [*self.controller, "nsenter", "--target", pid, "--net", "--uts", "--"]
            self.run(*f"ip link add to-{name} up master br0 type veth peer name eth0 netns {pid}".split())
            script = (
                f"hostname {name}; ip link set lo up; ip link set eth0 up; ip addr add {address}/24 dev eth0; "
                f"ip route add default via {CONTROLLER}"
            )
            subprocess.run([*self.hosts[name], "sh", "-ec", script], check=True)


def _namespaces_work():
    if os.environ.get("DEGFLOW_TEST_NO_NAMESPACES"):
        return False
    script = "ip link add br0 up type bridge && mount --bind /etc/hosts /etc/hosts"
    words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec", script]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _processes_of(folder):
    """Processes whose environment names our slurm.conf: job steps and their children."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/slurm.conf".encode() in path.read_bytes() and int(path.parts[2]) != os.getpid():
                yield int(path.parts[2])
