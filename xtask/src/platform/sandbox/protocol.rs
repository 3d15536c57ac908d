//! What commands and the sandbox say to each other: one JSON line each way on a Unix socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Time;
use crate::files;
use crate::platform::{InstanceCounts, Status};
use crate::release::ReleaseId;
use crate::rollout::engine::Mark;

/// Changes whenever the lines change; another number is another sandbox.
pub const VERSION: u32 = 2;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Request {
    /// Who is there.
    Hello,
    /// Everything there is.
    Status,
    /// Serve an environment on its port.
    Open {
        environment: String,
        port: u16,
    },
    Environment {
        environment: String,
    },
    Counts {
        environment: String,
    },
    Change {
        environment: String,
        token: u64,
        change: Change,
    },
    Stop,
}

/// How an environment should be.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Change {
    /// Nothing but the writer is new.
    Claim,
    Scale {
        run: Run,
        replicas: u32,
    },
    /// Ends what runs of a release; nothing of it need be known for that.
    Stop {
        release: ReleaseId,
    },
    Route {
        weights: Vec<(ReleaseId, u8)>,
    },
    /// `stable` is in service from now on; the history gets these marks for the rollout, in
    /// place of those it had.
    Record {
        rollout: String,
        stable: Option<ReleaseId>,
        marks: Vec<(ReleaseId, Mark)>,
    },
}

/// How to run a release's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub release: ReleaseId,
    pub version: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub variables: BTreeMap<String, String>,
    pub directory: PathBuf,
    pub ready_path: String,
    #[serde(with = "time")]
    pub drain_timeout: Time,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Reply {
    Hello {
        version: u32,
        pid: u32,
    },
    Sandbox(SandboxStatus),
    Environment(Status),
    Counts {
        counts: Vec<InstanceCounts>,
    },
    Done,
    /// The writer was replaced by one with this token.
    Stale {
        newest: u64,
    },
    Refused {
        why: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub struct SandboxStatus {
    pub pid: u32,
    pub environments: BTreeMap<String, EnvironmentStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct EnvironmentStatus {
    pub port: u16,
    /// Why the port cannot be served.
    pub problem: Option<String>,
    pub status: Status,
}

/// The files of a sandbox.
#[derive(Debug, Clone)]
pub struct Places {
    pub dir: PathBuf,
}

impl Places {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Held for as long as the sandbox lives.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// There while the sandbox should run; left behind by one that was killed.
    pub fn pid(&self) -> PathBuf {
        self.dir.join("pid")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.join("sandbox.log")
    }

    pub fn logs(&self, environment: &str) -> PathBuf {
        self.dir.join("logs").join(environment)
    }

    pub fn data(&self, environment: &str) -> PathBuf {
        self.dir.join("data").join(environment)
    }

    pub fn root(&self, image: &str) -> PathBuf {
        self.dir.join("images").join(image.replace(':', "-"))
    }

    pub fn config(&self, release: &ReleaseId) -> PathBuf {
        self.dir.join("config").join(release.short())
    }

    /// A socket's name has at most 107 bytes (unix(7)); a longer one goes to the temporary
    /// directory.
    pub fn socket(&self) -> PathBuf {
        let beside = self.dir.join("socket");
        if beside.as_os_str().len() < 100 {
            return beside;
        }
        let name = files::sha256(self.dir.as_os_str().as_encoded_bytes());
        std::env::temp_dir().join(format!("xtask-{}.sock", &name[..16]))
    }

    pub fn exists(&self) -> bool {
        Path::new(&self.state()).exists()
    }
}

/// Milliseconds on the wire.
mod time {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::config::Time;

    pub(super) fn serialize<S: Serializer>(time: &Time, serializer: S) -> Result<S::Ok, S::Error> {
        time.millis().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Time, D::Error> {
        u64::deserialize(deserializer).map(|millis| Time(Duration::from_millis(millis)))
    }
}
