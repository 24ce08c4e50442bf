//! A piece of a prompt whose queries and results stay on the device.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::batch::Batch;
use super::buffer::DeviceBuffer;
use super::error::{CudaError, Doing};
use super::many::{Many, Piece, Queries};
use super::streamed::Streamed;
use crate::device::LayerGeometry;
use crate::scales::LaneScales;
use crate::slot::CHUNK_TOKENS;

/// Query tokens, and what attending a layer gives for them.
pub struct Prompt {
    stream: Arc<CudaStream>,
    queries: DeviceBuffer<f32>,
    output: DeviceBuffer<f32>,
    lse: DeviceBuffer<f32>,
    count: usize,
    first_position: usize,
}

impl Prompt {
    /// Copies `queries`, `[query][query_head][head_dim]`, of the tokens from `first_position` on to the device.
    ///
    /// # Errors
    /// Memory that the device does not have, or a failed copy.
    pub fn new(stream: &Arc<CudaStream>, geometry: &LayerGeometry, queries: &[f32], first_position: usize) -> Result<Self, CudaError> {
        let heads = queries.len() / geometry.head_dim;
        Ok(Self {
            stream: Arc::clone(stream),
            queries: DeviceBuffer::from_slice(stream, queries)?,
            output: DeviceBuffer::zeroed(stream, queries.len())?,
            lse: DeviceBuffer::zeroed(stream, heads)?,
            count: heads / geometry.heads.query_heads(),
            first_position,
        })
    }

    fn queries(&self) -> Queries {
        Queries { address: self.queries.address(), count: self.count, first_position: self.first_position, window: None }
    }

    /// Attends layers whose pages lie in host memory, by layer and chunk, one after the other, and waits for the last. Results are the last
    /// layer's.
    ///
    /// # Errors
    /// Memory that the device does not have, or a failure of the device.
    pub fn over_host(&self, streamed: &mut Streamed, scales: &LaneScales, layers: &[Vec<&[u8]>]) -> Result<(), CudaError> {
        for pages in layers {
            // SAFETY: pages are borrowed until the stream has been waited for below, also after an error; buffers wait when they are freed.
            let run = unsafe { streamed.start(self.queries().keys(), pages) };
            // SAFETY: as above.
            let done =
                run.and_then(|run| unsafe { run.attend(&self.stream, self.queries(), scales, self.output.address(), self.lse.address()) });
            if done.is_err() {
                self.stream.synchronize().doing("waiting for attention")?;
            }
            done?;
        }
        self.stream.synchronize().doing("waiting for attention")
    }

    /// Attends layers of slot 0 of a batch, whose newest pages are all pages, one after the other, and waits for the last. Results are the
    /// last layer's.
    ///
    /// # Errors
    /// Memory that the device does not have, or a failure of the device.
    pub fn over_device(&self, many: &mut Many, batch: &Batch, scales: &LaneScales, layers: Range<usize>) -> Result<(), CudaError> {
        let seat = Arc::clone(batch.seat(0).ok_or(CudaError::NoHostRows)?);
        let (chunks, page_bytes) = (seat.shape().tail_chunks, seat.shape().geometry.page_bytes());
        let (keys, lanes) = (0..self.queries().keys().end, 0..seat.shape().geometry.heads.lanes());
        assert!(keys.end <= chunks * CHUNK_TOKENS, "pages of all keys");
        let page = |layer, chunk| seat.tail_address(layer) + (chunk * page_bytes) as u64;
        let table: Vec<u64> =
            layers.clone().flat_map(|layer| (0..chunks).map(move |chunk| (layer, chunk))).map(|(l, c)| page(l, c)).collect();
        let table = DeviceBuffer::from_slice(&self.stream, &table)?;
        for layer in 0..layers.len() {
            many.begin(&self.stream, self.queries(), scales)?;
            let piece = Piece { pages: table.address_of(layer * chunks), keys: keys.clone(), lanes: lanes.clone() };
            // SAFETY: the seat is kept until the stream has been waited for, and buffers wait when they are freed.
            unsafe {
                many.attend(&self.stream, &piece)?;
                many.finish(&self.stream, self.output.address(), self.lse.address())?;
            }
        }
        self.stream.synchronize().doing("waiting for attention")
    }

    /// Outputs, `[query][query_head][head_dim]`, and natural log-sum-exps, `[query][query_head]`. Waits.
    ///
    /// # Errors
    /// A failed copy.
    pub fn results(&self) -> Result<(Vec<f32>, Vec<f32>), CudaError> {
        let (mut output, mut lse) = (vec![0.0; self.output.len()], vec![0.0; self.lse.len()]);
        self.output.read(&self.stream, 0, &mut output)?;
        self.lse.read(&self.stream, 0, &mut lse)?;
        Ok((output, lse))
    }
}
