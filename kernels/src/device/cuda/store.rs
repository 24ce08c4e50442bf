//! The hot rows of a seat: places of all its layers and lanes in one store, handed out in blocks that move between lanes.
//!
//! A lane numbers its places from 0 on; its list of blocks says where they are stored. A lane that is given a block has so many more places; a
//! lane that gives one forgets the rows in it. Which rows are hot decides where a step reads them, never its result.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaStream;
use parking_lot::Mutex;

use super::buffer::DeviceBuffer;
use super::error::CudaError;
use super::jobs::{COLD, POOL_BLOCK};
use super::open::Gpu;
use super::seat::{SeatShape, bound};

/// Blocks of a lane at most: places have 16-bit numbers.
const MOST_BLOCKS: usize = (COLD as usize - 1) / POOL_BLOCK;

/// A block of hot places that goes from one lane to another, both `layer x lanes + lane`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolMove {
    /// Who gives its last block.
    pub from: usize,
    /// Who gets it.
    pub to: usize,
}

/// What the kernel needs to know of a move: struct BlockMove of hot.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct BlockMove {
    /// u16 by row: the giver's map.
    map: u64,
    /// u32 by place of the block: its rows.
    owner: u64,
    /// u32: where the receiver's list goes on.
    entry: u64,
    /// u32: places of the giver, and of the receiver.
    from_pool: u64,
    to_pool: u64,
    /// Block of stored rows.
    block: u32,
    unused: u32,
}

/// Hot rows of all layers and lanes, and whose they are.
#[derive(Debug)]
pub(super) struct HotStore {
    pub(super) rows: DeviceBuffer<u8>,
    pub(super) owner: DeviceBuffer<u32>,
    /// `[layer][lane][most blocks]`.
    blocks: DeviceBuffer<u32>,
    /// `[layer][lane]`: places.
    pools: DeviceBuffer<u32>,
    /// What the two tables say.
    held: Mutex<Vec<Vec<u32>>>,
    most_blocks: usize,
}

impl SeatShape {
    /// Hot places of all lanes together.
    pub(super) fn places(&self) -> usize {
        self.layers * self.lanes() * self.pool()
    }

    /// Blocks of a lane at most.
    fn most_blocks(&self) -> usize {
        (self.max_tokens.max(self.pool()) / POOL_BLOCK).min(MOST_BLOCKS)
    }

    /// Bytes of the tables of a seat with maps.
    pub(super) fn store_table_bytes(&self) -> usize {
        (self.places() + self.layers * self.lanes() * (self.most_blocks() + 1)) * size_of::<u32>()
    }
}

impl HotStore {
    /// Equal pools for all lanes of a seat with maps, nobody in them; for one without maps, room for all of its rows.
    pub(super) fn new(gpu: &Gpu, stream: &Arc<CudaStream>, shape: &SeatShape) -> Result<Self, CudaError> {
        let context = &gpu.context;
        let rows = DeviceBuffer::uninitialised(context, shape.places() * shape.geometry.row_bytes())?;
        let lanes = if shape.has_maps() { shape.layers * shape.lanes() } else { 0 };
        let (each, most_blocks) = (shape.pool() / POOL_BLOCK, shape.most_blocks());
        let held: Vec<Vec<u32>> = (0..lanes).map(|lane| ((lane * each) as u32..((lane + 1) * each) as u32).collect()).collect();
        let mut lists = vec![0; lanes * most_blocks];
        lists.chunks_exact_mut(most_blocks.max(1)).zip(&held).for_each(|(list, held)| list[..held.len()].copy_from_slice(held));
        Ok(Self {
            rows,
            owner: DeviceBuffer::filled(stream, if lanes > 0 { shape.places() } else { 0 })?,
            blocks: DeviceBuffer::from_slice(stream, &lists)?,
            pools: DeviceBuffer::from_slice(stream, &vec![shape.pool() as u32; lanes])?,
            held: Mutex::new(held),
            most_blocks,
        })
    }

    /// Address of a lane's list of blocks.
    pub(super) fn blocks_address(&self, lane: usize) -> u64 {
        self.blocks.address_of(lane * self.most_blocks)
    }

    /// Address of a lane's number of places.
    pub(super) fn pool_address(&self, lane: usize) -> u64 {
        self.pools.address_of(lane)
    }

    /// Blocks of a lane at most.
    pub(super) fn most_blocks(&self) -> usize {
        self.most_blocks
    }

    /// Blocks of every lane.
    pub(super) fn sizes(&self) -> Vec<usize> {
        self.held.lock().iter().map(Vec::len).collect()
    }

    /// Places of the lane that has fewest; without maps there is a place for every row.
    pub(super) fn least(&self) -> usize {
        self.held.lock().iter().map(|blocks| blocks.len() * POOL_BLOCK).min().unwrap_or(usize::MAX)
    }

    /// Notes moves, and gives the orders that make the device follow; `map` gives the address of a lane's map. Nothing is noted where a move is
    /// impossible.
    ///
    /// # Errors
    /// A lane without blocks gives, or one that has as many as its places have numbers for takes.
    pub(super) fn note(&self, moves: &[PoolMove], map: impl Fn(usize) -> u64) -> Result<Vec<BlockMove>, CudaError> {
        let mut held = self.held.lock();
        let mut after = held.clone();
        let (mut gave, mut took) = (vec![false; after.len()], vec![false; after.len()]);
        let mut orders = Vec::with_capacity(moves.len());
        for &PoolMove { from, to } in moves {
            bound("lane of a hot block", from.max(to), 0, after.len().saturating_sub(1))?;
            // The device makes all moves at once, so a block has one giver.
            (gave[from], took[to]) = (true, true);
            bound("lanes that both give and take blocks", usize::from(took[from] || gave[to]), 0, 0)?;
            bound("blocks of a lane that takes one", after[to].len(), 0, self.most_blocks - 1)?;
            bound("blocks of a lane that gives one", after[from].len(), 1, self.most_blocks)?;
            let Some(block) = after[from].pop() else { continue };
            orders.push(BlockMove {
                map: map(from),
                owner: self.owner.address_of(block as usize * POOL_BLOCK),
                entry: self.blocks.address_of(to * self.most_blocks + after[to].len()),
                from_pool: self.pool_address(from),
                to_pool: self.pool_address(to),
                block,
                unused: 0,
            });
            after[to].push(block);
        }
        *held = after;
        Ok(orders)
    }
}
