//! What a prompt costs whose earlier part lies on the host: exact attention of its pieces, and the rows that they append.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use sluice_kernels::device::cuda::Cuda;
use sluice_kernels::device::cuda::append::{Appender, BufferRows};
use sluice_kernels::device::cuda::batch::Batch;
use sluice_kernels::device::cuda::buffer::{DeviceBuffer, HostAccess};
use sluice_kernels::device::cuda::host::{HostFile, HostRows, HostSegment};
use sluice_kernels::device::cuda::many::Many;
use sluice_kernels::device::cuda::probe::Probe;
use sluice_kernels::device::cuda::prompt::Prompt as OnDevice;
use sluice_kernels::device::cuda::seat::DeviceBytes;
use sluice_kernels::device::cuda::streamed::{PIECE_BYTES, Streamed};
use sluice_kernels::device::cuda::timer::Timer;
use sluice_kernels::device::{Device, ManyJob};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::shared::segment::{Access, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use super::outcome::{Outcome, PartOutcome, StepOutcome};
use super::scene::Scene;
use super::timed::timed;
use crate::report::show_progress;
use crate::statistics::median;

/// Query tokens of a piece of a prompt.
const QUERIES: [usize; 4] = [16, 64, 256, 512];
/// Query tokens of the piece that a first token waits for.
const PIECE: usize = 512;
/// Tokens appended in a round, in pieces.
const APPENDED: usize = 8 * PIECE;
/// Rounds of whole passes over all layers.
const PASSES: usize = 3;

/// A piece of a prompt after a prefix of half the context.
struct Prompt<'a> {
    scene: &'a Scene<'a>,
    prefix: usize,
    count: usize,
    queries: Vec<f32>,
}

impl<'a> Prompt<'a> {
    fn new(scene: &'a Scene<'a>, count: usize) -> Self {
        let prefix = scene.context / 2;
        let queries = (0..count).flat_map(|token| scene.generator.query(0, prefix + token, 0)).collect();
        Self { scene, prefix, count, queries }
    }

    fn end(&self) -> usize {
        self.prefix + self.count
    }

    fn pages(&self, layer: usize) -> Vec<&[u8]> {
        (0..self.end().div_ceil(CHUNK_TOKENS)).map(|chunk| self.scene.host.page(layer, chunk)).collect()
    }

    /// Bytes of the rows of a layer.
    fn bytes(&self) -> usize {
        self.end() * self.scene.geometry().heads.lanes() * self.scene.geometry().row_bytes()
    }
}

/// Attention of pieces, and appending their rows.
///
/// # Errors
/// Memory or a launch that is refused.
pub fn prefill(scene: &Scene<'_>, rounds: usize, outcome: &mut Outcome) -> Result<()> {
    let mut device = Cuda::open(scene.gpu.ordinal)?;
    let resident = scene.resident((scene.context / 2 + PIECE).next_multiple_of(CHUNK_TOKENS))?;
    for count in QUERIES {
        let prompt = Prompt::new(scene, count);
        show_progress(&format!("prefill, {count} queries"), 0, 1);
        let times = from_host(&prompt, &mut device, rounds);
        part(outcome, "prefill over the host, from and to host memory", &prompt, &times);
        let times = from_device(&prompt, &mut device, rounds)?;
        part(outcome, "prefill over the host, from and to the device", &prompt, &times);
        let times = from_resident(&prompt, &mut device, rounds, &resident)?;
        part(outcome, "prefill over the device", &prompt, &times);
    }
    first_token(&Prompt::new(scene, PIECE), &mut device, &resident, outcome)?;
    drop(resident);
    append(scene, rounds, outcome)
}

fn part(outcome: &mut Outcome, contestant: &str, prompt: &Prompt<'_>, times: &[f64]) {
    let layer_ms = median(times).unwrap_or(0.0);
    outcome.parts.push(PartOutcome {
        contestant: contestant.to_owned(),
        part: format!("{} queries, {} tokens", prompt.count, prompt.prefix),
        layer_us: layer_ms * 1e3,
        gb_per_s: Some(prompt.bytes() as f64 / layer_ms / 1e6),
    });
}

/// A layer at a time, with host queries and host results.
fn from_host(prompt: &Prompt<'_>, device: &mut Cuda, rounds: usize) -> Vec<f64> {
    let geometry = prompt.scene.geometry();
    let (mut output, mut lse) = (vec![0.0; prompt.queries.len()], vec![0.0; prompt.count * geometry.heads.query_heads()]);
    let mut times = Vec::new();
    for round in 0..1 + rounds {
        let pages = prompt.pages(round % prompt.scene.shape.layers.len());
        let job = ManyJob { geometry: &geometry, queries: &prompt.queries, first_position: prompt.prefix, window: None, pages: &pages };
        let begin = Instant::now();
        device.attend_many(&job, &mut output, &mut lse);
        if round > 0 {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
}

/// A layer at a time, with queries and results on the device.
fn from_device(prompt: &Prompt<'_>, device: &mut Cuda, rounds: usize) -> Result<Vec<f64>> {
    let geometry = prompt.scene.geometry();
    let (modules, stream) = device.parts();
    let on_device = OnDevice::new(stream, &geometry, &prompt.queries, prompt.prefix)?;
    let mut streamed = Streamed::new(modules, stream, &geometry, PIECE_BYTES)?;
    times_of(Timer::new(stream), rounds, |round| {
        let layers = [prompt.pages(round % prompt.scene.shape.layers.len())];
        Ok(on_device.over_host(&mut streamed, &geometry.scales, &layers)?)
    })
}

/// A layer at a time, with everything on the device.
fn from_resident(prompt: &Prompt<'_>, device: &mut Cuda, rounds: usize, resident: &Batch) -> Result<Vec<f64>> {
    let geometry = prompt.scene.geometry();
    let (modules, stream) = device.parts();
    let on_device = OnDevice::new(stream, &geometry, &prompt.queries, prompt.prefix)?;
    let mut many = Many::new(modules, &geometry)?;
    times_of(Timer::new(stream), rounds, |round| {
        let layer = round % prompt.scene.shape.layers.len();
        Ok(on_device.over_device(&mut many, resident, &geometry.scales, layer..layer + 1)?)
    })
}

/// A piece through all layers: what a first token waits for besides the model's other work.
fn first_token(prompt: &Prompt<'_>, device: &mut Cuda, resident: &Batch, outcome: &mut Outcome) -> Result<()> {
    let (geometry, layers) = (prompt.scene.geometry(), prompt.scene.shape.layers.len());
    let (modules, stream) = device.parts();
    let on_device = OnDevice::new(stream, &geometry, &prompt.queries, prompt.prefix)?;
    let mut streamed = Streamed::new(modules, stream, &geometry, PIECE_BYTES)?;
    let mut many = Many::new(modules, &geometry)?;
    let pages: Vec<Vec<&[u8]>> = (0..layers).map(|layer| prompt.pages(layer)).collect();
    let times = times_of(Timer::new(stream), PASSES, |_| Ok(on_device.over_host(&mut streamed, &geometry.scales, &pages)?))?;
    let name = |place| format!("first token: {} queries over {} tokens {place}", prompt.count, prompt.prefix);
    let bytes = DeviceBytes { workspace: streamed.bytes() as u64, ..DeviceBytes::default() };
    outcome.steps.push(StepOutcome::new(&name("on the host"), &times, None, bytes));
    let times = times_of(Timer::new(stream), PASSES, |_| Ok(on_device.over_device(&mut many, resident, &geometry.scales, 0..layers)?))?;
    outcome.steps.push(StepOutcome::new(&name("on the device"), &times, None, resident.bytes()));
    Ok(())
}

/// Milliseconds of each round but the first.
fn times_of(mut timer: Timer, rounds: usize, mut work: impl FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for round in 0..1 + rounds {
        let time = timed(&mut timer, || work(round))?;
        if round > 0 {
            times.push(time);
        }
    }
    Ok(times)
}

/// Rows of all layers from the device to open slots, with their labels, beside copies of as many bytes.
fn append(scene: &Scene<'_>, rounds: usize, outcome: &mut Outcome) -> Result<()> {
    show_progress("append", 0, 1);
    let geometry = scene.geometry();
    let layout = Arc::new(ClassLayout::new(scene.shape, SlotClass::Selected));
    let slots = (APPENDED / CHUNK_TOKENS) as u32;
    let file = tempfile::tempfile_in("/dev/shm").context("a file in /dev/shm")?;
    file.set_len(layout.segment_bytes(slots)).context("shared memory")?;
    let segment = Segment::map(0, slots, Arc::clone(&layout), &file, Access::Writable)?;
    segment.populate(std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    let mut host = HostRows::new(layout, vec![HostSegment::register(scene.gpu, HostFile::Sealed(Arc::new(segment)), HostAccess::Write)?]);
    let batch = scene.growing(APPENDED, &host)?;
    let mut appender = Appender::new(scene.gpu, scene.compiler, &batch, 0)?;
    let token_bytes = geometry.heads.lanes() * geometry.row_bytes();
    let rows = DeviceBuffer::zeroed(batch.stream(), PIECE * token_bytes)?;
    let (layers, pieces) = (scene.shape.layers.len(), APPENDED / PIECE);
    let all_bytes = (layers * APPENDED * token_bytes) as f64;
    let plane = DeviceBuffer::zeroed(batch.stream(), APPENDED * token_bytes)?;
    let places: Vec<u32> = (0..slots).collect();
    let (mut times, mut copies) = (Vec::new(), Vec::new());
    for round in 0..1 + rounds {
        let begin = Instant::now();
        let of_layers = (0..pieces).flat_map(|piece| (0..layers).map(move |layer| (piece * PIECE, layer)));
        let of_layers = of_layers.map(|(first_position, layer)| {
            let places = &places[first_position / CHUNK_TOKENS..(first_position + PIECE) / CHUNK_TOKENS];
            BufferRows { layer, first_position, rows: &rows, places }
        });
        appender.append_buffers(&batch, &mut host, of_layers)?;
        let appended = begin.elapsed();
        let begin = Instant::now();
        Probe::copy_to_host(batch.stream(), &plane, &host, layers)?;
        if round > 0 {
            times.push(appended.as_secs_f64() * 1e3);
            copies.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (part, times) in [("rows of 512 tokens to open slots, and labels", times), ("copies of as many bytes", copies)] {
        let all_ms = median(&times).unwrap_or(0.0);
        outcome.parts.push(PartOutcome {
            contestant: "append from the device".to_owned(),
            part: part.to_owned(),
            layer_us: all_ms * 1e3 / (layers * pieces) as f64,
            gb_per_s: Some(all_bytes / all_ms / 1e6),
        });
    }
    Ok(())
}
