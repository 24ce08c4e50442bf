//! A decode step of the CPU device over rows in a shared tmpfs mapping, each part beside its floor, measured in turns.
//!
//! `cargo bench -p sluice-kernels --bench step -- [tokens] [threads] [rounds] [layers]`, by default 262144 2 15 4: 8 lanes, 32 query heads,
//! d = 128, f16, 4 GiB, layer-major, chunks in random slots, 4 KiB pages. All figures are medians over rounds (and the best of
//! each part), in milliseconds for all layers.

use std::fs::File;
use std::time::Instant;

use memmap2::{MmapMut, MmapOptions};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use sluice_kernels::device::cpu::Cpu;
use sluice_kernels::device::{AttendJob, Device, LabelJob, LayerGeometry, ManyJob, StepJob, StepResult};
use sluice_kernels::heads::HeadMap;
use sluice_kernels::label::{LabelCoder, LabelPlan, LaneCalibration, LayerCalibration};
use sluice_kernels::probe::{GatherLayer, gather_probe, read_probe};
use sluice_kernels::rows::{PackJob, pack_rows};
use sluice_kernels::scales::LaneScales;
use sluice_kernels::shape::RowType;

const LANES: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const CHUNK: usize = 256;
const PAGE: usize = LANES * CHUNK * 2 * DIM * 2;
const TEMPLATES: usize = 64;

struct Settings {
    chunks: usize,
    threads: usize,
    rounds: usize,
    layers: usize,
}

fn settings() -> Settings {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let number = |index: usize, default: usize| numbers.get(index).copied().unwrap_or(default);
    Settings { chunks: number(0, 262_144) / CHUNK, threads: number(1, 2), rounds: number(2, 15), layers: number(3, 4) }
}

fn geometry() -> LayerGeometry {
    LayerGeometry {
        heads: HeadMap::new((LANES * GROUP) as u16, LANES as u16),
        head_dim: DIM,
        row_type: RowType::F16,
        softmax_scale: 1.0 / (DIM as f32).sqrt(),
        scales: LaneScales::default(),
    }
}

fn normal(rng: &mut StdRng) -> f32 {
    (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.87
}

/// Pages of clustered keys with outlier channels.
fn templates(rng: &mut StdRng) -> Vec<Vec<u8>> {
    let centres: Vec<f32> = (0..16 * DIM).map(|_| normal(rng)).collect();
    let spread: Vec<f32> = (0..DIM).map(|channel| if channel % 16 == 3 { 4.0 } else { 0.7 }).collect();
    let page = |rng: &mut StdRng| {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for _ in 0..CHUNK * LANES {
            let cluster = rng.random_range(0..16) * DIM;
            keys.extend((0..DIM).map(|channel| (centres[cluster + channel] + 0.6 * normal(rng)) * spread[channel]));
            values.extend((0..DIM).map(|_| normal(rng)));
        }
        let mut page = vec![0; PAGE];
        let scales = &LaneScales::default();
        pack_rows(&PackJob { keys: &keys, values: &values, lanes: LANES, head_dim: DIM, row_type: RowType::F16, scales }, &mut page);
        page
    };
    (0..TEMPLATES).map(|_| page(rng)).collect()
}

fn tmpfs(bytes: usize) -> std::io::Result<(File, MmapMut)> {
    let folder = std::path::Path::new("/dev/shm");
    let file = tempfile::tempfile_in(folder)?;
    file.set_len(bytes as u64)?;
    // SAFETY: the file has no name, so nobody else maps or truncates it.
    let map = unsafe { MmapOptions::new().len(bytes).map_mut(&file)? };
    Ok((file, map))
}

fn coder() -> LabelCoder {
    let lane = |lane: usize| LaneCalibration {
        order: (0..DIM).map(|rank| ((rank * 7 + lane * 5) % DIM) as u16).collect(),
        magnitude: vec![1.0; DIM],
        low: vec![-3.0; DIM],
        high: vec![3.0; DIM],
    };
    LabelCoder::new(&LabelPlan::small(DIM as u16), &LayerCalibration { layer: 0, lanes: (0..LANES).map(lane).collect() })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// Milliseconds of processor time of this thread: with one compute thread, what a step costs however busy the machine is.
fn processor_milliseconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Everything that a step reads.
struct World<'a> {
    settings: &'a Settings,
    /// `[layer][chunk]`.
    pages: Vec<Vec<&'a [u8]>>,
    labels: Vec<Vec<&'a [u8]>>,
    coder: LabelCoder,
    query: Vec<f32>,
}

fn sparse(device: &mut Cpu, world: &World, ratio: usize) {
    let rows = world.settings.chunks * CHUNK;
    let horizon = world.settings.chunks - 1;
    let count = rows / ratio;
    let mut parts: [Vec<f64>; 7] = Default::default();
    let mut processor: [Vec<f64>; 3] = Default::default();
    for _ in 0..world.settings.rounds {
        let before = processor_milliseconds();
        let (mut times, mut all_positions) = ([0.0; 4], Vec::new());
        for layer in 0..world.settings.layers {
            let (mut positions, mut output, mut lse) = (vec![0; LANES * count], vec![0.0; LANES * GROUP * DIM], vec![0.0; LANES * GROUP]);
            let job = StepJob {
                geometry: &geometry(),
                query: &world.query,
                labels: &world.labels[layer][..horizon],
                coder: &world.coder,
                pages: &world.pages[layer],
                count,
                sinks: 4,
                exact_to: rows,
            };
            let start = Instant::now();
            let step = device.step(&job, StepResult { positions: &mut positions, output: &mut output, lse: &mut lse });
            times[0] += milliseconds(start);
            for (sum, part) in times[1..].iter_mut().zip([step.score, step.select, step.attend]) {
                *sum += part.as_secs_f64() * 1e3;
            }
            all_positions.push(positions);
        }
        let after = processor_milliseconds();
        let lanes: Vec<Vec<&[u32]>> = all_positions.iter().map(|layer| layer.chunks(count).collect()).collect();
        let layers = lanes.iter().zip(&world.pages);
        let gather: Vec<GatherLayer> =
            layers.map(|(positions, pages)| GatherLayer { pages, positions, rows_per_page: CHUNK, row_bytes: 512 }).collect();
        let before_probes = processor_milliseconds();
        let gathered = gather_probe(&gather, world.settings.threads).expect("positions within the pages");
        let labels: Vec<&[u8]> = world.labels.iter().flat_map(|layer| layer[..horizon].iter().copied()).collect();
        let read = read_probe(&labels, world.settings.threads);
        let probes = processor_milliseconds() - before_probes;
        for (part, value) in processor.iter_mut().zip([after - before, probes, (after - before) / probes]) {
            part.push(value);
        }
        let values = [times[0], times[1], times[2], times[3], gathered.seconds * 1e3, read.seconds * 1e3];
        for (part, value) in parts.iter_mut().zip(values) {
            part.push(value);
        }
        parts[6].push(times[0] / (gathered.seconds * 1e3 + read.seconds * 1e3));
    }
    let [step, score, select, attend, gather, read, ratio_to_floor] = parts.each_mut().map(|part| median(part));
    println!(
        "n/{ratio:<3} step {step:6.2} = score {score:5.2} (read {read:5.2}) + select {select:5.2} + attend {attend:6.2} (gather {gather:6.2}); \
         {ratio_to_floor:.2} x floor; {:.1} GB/s labels, {:.1} GB/s rows",
        (world.settings.layers * horizon * LANES * CHUNK * 16) as f64 / score / 1e6,
        (world.settings.layers * LANES * count * 512) as f64 / attend / 1e6,
    );
    if world.settings.threads == 1 {
        let [step, probes, ratio] = processor.map(|mut part| median(&mut part));
        println!("      processor time: step {step:.2}, floor {probes:.2}, {ratio:.2} x");
    }
    let [step, score, select, attend, gather, read, ratio_to_floor] = parts.map(|part| part[0]);
    println!(
        "      best {step:6.2}   score {score:5.2} (read {read:5.2})   select {select:5.2}   attend {attend:6.2} (gather {gather:6.2}); \
         {ratio_to_floor:.2} x floor"
    );
}

fn dense(device: &mut Cpu, world: &World) {
    let rows = world.settings.chunks * CHUNK;
    let bytes = (world.settings.layers * LANES * rows * 512) as f64;
    let mut parts: [Vec<f64>; 3] = Default::default();
    for _ in 0..world.settings.rounds.min(7) {
        let start = Instant::now();
        for pages in &world.pages {
            let (mut output, mut lse) = (vec![0.0; LANES * GROUP * DIM], vec![0.0; LANES * GROUP]);
            let job = AttendJob {
                geometry: &geometry(),
                query: &world.query,
                pages,
                listed: &[],
                listed_per_lane: 0,
                exact_from: 0,
                exact_to: rows,
                hot: None,
            };
            device.attend(&job, &mut output, &mut lse);
        }
        let time = milliseconds(start);
        let pages: Vec<&[u8]> = world.pages.iter().flatten().copied().collect();
        let read = read_probe(&pages, world.settings.threads);
        parts[0].push(time);
        parts[1].push(read.seconds * 1e3);
        parts[2].push(bytes / time / 1e6 / read.gb_per_s().min(30.0));
    }
    let [time, read, ratio] = parts.each_mut().map(|part| median(part));
    println!(
        "dense step {time:.1} ({:.1} GB/s), read {read:.1} ({:.1} GB/s): {:.0} % of min(read rate, 30 GB/s)",
        bytes / time / 1e6,
        bytes / read / 1e6,
        ratio * 100.0
    );
    let [time, read] = [&parts[0], &parts[1]].map(|part| part[0]);
    println!("      best {time:.1} ({:.1} GB/s), read {read:.1} ({:.1} GB/s)", bytes / time / 1e6, bytes / read / 1e6);
}

/// Exact causal attention as in the prefill of a Gemma layer: 1 lane, 4 heads, d = 256.
fn prefill(device: &mut Cpu, tokens: usize) {
    let mut rng = StdRng::seed_from_u64(3);
    let (row_type, scales) = (RowType::F16, LaneScales::default());
    let geometry = &LayerGeometry { heads: HeadMap::new(4, 1), head_dim: 256, row_type, softmax_scale: 1.0 / 16.0, scales };
    let mut random = |count: usize| (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect::<Vec<f32>>();
    let (keys, values, queries) = (random(tokens * 256), random(tokens * 256), random(tokens * 1024));
    let mut rows = vec![0; tokens * 1024];
    pack_rows(&PackJob { keys: &keys, values: &values, lanes: 1, head_dim: 256, row_type, scales: &geometry.scales }, &mut rows);
    let pages: Vec<&[u8]> = rows.chunks(CHUNK * 1024).collect();
    let (mut output, mut lse) = (vec![0.0; tokens * 1024], vec![0.0; tokens * 4]);
    let job = ManyJob { geometry, queries: &queries, first_position: 0, window: None, pages: &pages };
    let start = Instant::now();
    device.attend_many(&job, &mut output, &mut lse);
    let time = milliseconds(start);
    let flops = 4.0 * (tokens as f64).powi(2) / 2.0 * 256.0 * 4.0;
    println!("prefill of {tokens} tokens, 4 heads, d = 256: {time:.0} ms a layer, {:.0} GFLOP/s", flops / time / 1e6);
}

fn main() -> std::io::Result<()> {
    let settings = settings();
    let mut rng = StdRng::seed_from_u64(1);
    let templates = templates(&mut rng);
    let (_file, mut map) = tmpfs(settings.layers * settings.chunks * PAGE)?;
    let mut slots: Vec<usize> = (0..settings.chunks).collect();
    slots.shuffle(&mut rng);
    for page in map.chunks_exact_mut(PAGE) {
        page.copy_from_slice(&templates[rng.random_range(0..TEMPLATES)]);
    }
    let map = &map[..];
    let page = |layer: usize, chunk: usize| &map[(layer * settings.chunks + slots[chunk]) * PAGE..][..PAGE];
    let pages: Vec<Vec<&[u8]>> = (0..settings.layers).map(|layer| (0..settings.chunks).map(|chunk| page(layer, chunk)).collect()).collect();
    let mut device = Cpu::open(settings.threads).map_err(std::io::Error::other)?;
    let coder = coder();
    let start = Instant::now();
    let label = |device: &mut Cpu, page: &[u8]| {
        let mut labels = vec![0; LANES * CHUNK * 16];
        device.label(&LabelJob { geometry: &geometry(), page, coder: &coder }, &mut labels);
        labels
    };
    let labels: Vec<Vec<Vec<u8>>> = pages.iter().map(|layer| layer.iter().map(|page| label(&mut device, page)).collect()).collect();
    println!("{}: {} threads; labels of {} MiB in {:.0} ms", device.name(), settings.threads, map.len() >> 20, milliseconds(start));
    let labels: Vec<Vec<&[u8]>> = labels.iter().map(|layer| layer.iter().map(Vec::as_slice).collect()).collect();
    let query = (0..LANES * GROUP * DIM).map(|_| normal(&mut rng)).collect();
    let world = World { settings: &settings, pages, labels, coder, query };
    for ratio in [16, 64] {
        sparse(&mut device, &world, ratio);
    }
    dense(&mut device, &world);
    prefill(&mut device, 4096);
    Ok(())
}
