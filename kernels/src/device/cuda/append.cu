// Appends the newest row of every sequence, for steps that score no labels: the sample kernel of score.cu does it for the others.
#include "append.cuh"

constexpr u32 THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) append(const StepJob job) {
    enter_stream();
    const u32 lane = blockIdx.y, slot = blockIdx.z;
    const SequenceState sequence = reinterpret_cast<const SequenceState*>(job.sequences)[slot];
    const LayerPlace place = reinterpret_cast<const LayerPlace*>(job.places)[slot];
    if (sequence.length == 0) return;
    append_row(job, sequence, place, slot, lane);
}
