//! The host side of a GPU bench: a long sequence's rows in shared-memory segments, in random slots, registered with the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use sluice_kernels::device::cuda::Gpu;
use sluice_kernels::device::cuda::buffer::HostAccess;
use sluice_kernels::device::cuda::host::{HostFile, HostRows, HostSegment};
use sluice_kernels::layout::ClassLayout;
use sluice_kernels::shape::ModelShape;
use sluice_kernels::shared::segment::{Access, Segment};
use sluice_kernels::slot::{CHUNK_TOKENS, SlotClass};

use crate::generator::Generator;
use crate::report::show_progress;

/// Rows of one sequence on the host.
pub struct HostCache {
    /// Registered segments: sealed ones, read-only, then one that holds the last chunk, which grows.
    pub rows: Arc<HostRows>,
    /// By chunk: `segment << 16 | slot`.
    pub places: Vec<u32>,
    /// Seconds to fill.
    pub fill_s: f64,
    /// Seconds to map and register.
    pub register_s: f64,
}

impl HostCache {
    /// Fills `chunks` chunks of a sequence and registers them.
    ///
    /// # Errors
    /// Shared memory or a registration that is refused.
    pub fn fill(gpu: &Gpu, shape: &ModelShape, generator: &Generator, chunks: usize, seed: u64, threads: usize) -> Result<Self> {
        let layout = Arc::new(ClassLayout::new(shape, SlotClass::Selected));
        let slots = layout.slots_in(1 << 30) as usize;
        let sealed = chunks - 1;
        let count = sealed.div_ceil(slots);
        let mut order: Vec<u32> = (0..count * slots).map(|slot| (((slot / slots) << 16) | (slot % slots)) as u32).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let mut places = order[..sealed].to_vec();
        places.push((count << 16) as u32);
        let start = Instant::now();
        let file = |bytes: u64| -> Result<std::fs::File> {
            let file = tempfile::tempfile_in("/dev/shm").context("a file in /dev/shm")?;
            file.set_len(bytes).context("shared memory")?;
            Ok(file)
        };
        let mut files = Vec::new();
        let mut writable = Vec::new();
        for id in 0..=count {
            let of = if id == count { 1 } else { slots } as u32;
            let file = file(layout.segment_bytes(of))?;
            writable.push(Arc::new(Segment::map(id as u32, of, Arc::clone(&layout), &file, Access::Writable)?));
            files.push(file);
        }
        fill_chunks(&layout, &writable, &places, generator, threads);
        let fill_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut segments = Vec::new();
        for (id, file) in files.iter().enumerate() {
            show_progress("registering segments", id, files.len());
            let (access, host) = if id == count { (Access::Writable, HostAccess::Write) } else { (Access::ReadOnly, HostAccess::Read) };
            let segment = Segment::map(id as u32, writable[id].slots, Arc::clone(&layout), file, access)?;
            segment.populate(threads);
            segments.push(HostSegment::register(gpu, HostFile::Sealed(Arc::new(segment)), host)?);
        }
        let rows = Arc::new(HostRows::new(layout, segments));
        Ok(Self { rows, places, fill_s, register_s: start.elapsed().as_secs_f64() })
    }

    /// The page of a chunk in a layer, read by the processor.
    #[must_use]
    pub fn page(&self, layer: usize, chunk: usize) -> &[u8] {
        self.rows.page(layer, self.places[chunk])
    }
}

fn fill_chunks(layout: &ClassLayout, segments: &[Arc<Segment>], places: &[u32], generator: &Generator, threads: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let chunk = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&place) = places.get(chunk) else { break };
                    show_progress("filling host memory, chunks", chunk, places.len());
                    for (layer, plane) in layout.planes.iter().enumerate() {
                        let tokens = chunk * CHUNK_TOKENS..(chunk + 1) * CHUNK_TOKENS;
                        segments[(place >> 16) as usize].fill_page(plane, place & 0xFFFF, |page| generator.fill_rows(layer, tokens, page));
                    }
                }
            });
        }
    });
}
