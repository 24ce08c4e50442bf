//! `sluice-bench stress`: a long sequence through a daemon of its own, decoded by a worker of its own, beside what the memory allows.
//!
//! The parent starts both processes, samples the daemon's memory while they work, and reports.

pub mod messages;
pub mod options;
pub mod outcome;
pub mod recall;
mod steps;
pub mod worker;

use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sluice_client::{Client, ClientConfig};

use crate::daemon::{LocalDaemon, rss_anon_bytes};
use crate::report::{Format, show_progress};
use messages::{Event, Order, WorkerOutcome, receive, send};
use outcome::{DaemonOutcome, StressOutcome};

pub use options::StressOptions;

/// Time between two looks at the daemon's memory.
const MEMORY_POLL: Duration = Duration::from_millis(25);

/// Carries out a stress run and writes its result to standard output.
///
/// # Errors
/// Flags out of bounds, a daemon or worker that fails, or an answer that is wrong.
pub fn run(options: &StressOptions) -> Result<()> {
    options.check()?;
    let begin = Instant::now();
    eprintln!("start the daemon");
    let daemon = LocalDaemon::start(&options.workload.daemon(options.sequences(), options.steps))?;
    let order = Order { options: options.clone(), socket: daemon.socket(), arena: daemon.arena().to_owned() };
    let (worker, rss_anon_peak_bytes) = with_memory_peak(daemon.pid(), |unwatched| work(&order, unwatched))?;
    let stats = Client::connect(path_text(&order.socket)?, ClientConfig::default())?.stats()?;
    ensure!(stats.sequences_held == 0, "{} sequences are still held after all were closed", stats.sequences_held);
    let daemon_outcome = DaemonOutcome {
        version: stats.version,
        device: stats.device,
        rss_anon_peak_bytes,
        label_bytes: stats.label_bytes,
        arena_used_bytes: stats.arena_used_bytes,
        open_descriptors: stats.open_descriptors,
    };
    daemon.stop()?;
    let total_seconds = begin.elapsed().as_secs_f64();
    let outcome = StressOutcome { options: options.clone(), worker, daemon: daemon_outcome, total_seconds };
    if let Some(path) = &options.workload.plot {
        outcome.plot().write_svg(path)?;
    }
    match options.workload.format {
        Format::Table => println!("{}", outcome.table()?),
        Format::Json => println!("{}", serde_json::to_string(&outcome.json()?)?),
    }
    Ok(())
}

/// Runs `work` and samples the anonymous memory of a process meanwhile, until `work` ends or sets the flag that it is given.
fn with_memory_peak<T>(pid: u32, work: impl FnOnce(&AtomicBool) -> Result<T>) -> Result<(T, u64)> {
    let (done, peak) = (AtomicBool::new(false), AtomicU64::new(rss_anon_bytes(pid)?));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // A daemon that is gone shows in the work itself, with its reason.
                if let Ok(bytes) = rss_anon_bytes(pid) {
                    peak.fetch_max(bytes, Ordering::Relaxed);
                }
                std::thread::sleep(MEMORY_POLL);
            }
        });
        let result = work(&done);
        done.store(true, Ordering::Relaxed);
        result
    });
    Ok((result?, peak.into_inner()))
}

/// A child that does not outlive its owner.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        // Nothing to do for one that has ended; one that has not belongs to a run that failed and is reported.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn work(order: &Order, unwatched: &AtomicBool) -> Result<WorkerOutcome> {
    let own: PathBuf = std::env::current_exe().context("path of this binary")?;
    let child = Command::new(own).arg("stress-worker").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut worker = Worker(child.context("start the worker")?);
    let mut orders = worker.0.stdin.take().ok_or_else(|| anyhow!("the worker has no input"))?;
    let mut events = BufReader::new(worker.0.stdout.take().ok_or_else(|| anyhow!("the worker has no output"))?);
    send(&mut orders, order)?;
    loop {
        match receive(&mut events).context("worker")? {
            Event::Progress { stage, done, total } => {
                if stage == steps::COMPARE {
                    unwatched.store(true, Ordering::Relaxed);
                }
                show_progress(&stage, done, total);
            }
            Event::Failed(text) => bail!("worker: {text}"),
            Event::Done(outcome) => return Ok(*outcome),
        }
    }
}

fn path_text(path: &std::path::Path) -> Result<&str> {
    path.to_str().ok_or_else(|| anyhow!("{}: not UTF-8", path.display()))
}
