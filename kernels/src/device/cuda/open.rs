//! Finding the driver and a device, or saying what was looked for.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use thiserror::Error;

use super::error::{CudaError, Doing};

/// Oldest driver that has every function we call, as `cuDriverGetVersion` counts: 1000 x major + 10 x minor.
const OLDEST_DRIVER: i32 = 12_080;

/// Oldest compute capability: the first with asynchronous copies to shared memory and matrix products of bfloat16.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// A GPU that could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No library of the CUDA driver loads.
    #[error("cuda:{ordinal}: looked for the CUDA driver as {}; none of them loads", names.join(", "))]
    NoDriver {
        /// Device asked for.
        ordinal: u32,
        /// Library names tried.
        names: Vec<String>,
    },
    /// The driver is too old.
    #[error("cuda:{ordinal}: the driver serves CUDA {}; {} or newer is needed", version(*found), version(*needed))]
    DriverVersion {
        /// Device asked for.
        ordinal: u32,
        /// Version found, 1000 x major + 10 x minor.
        found: i32,
        /// The bound.
        needed: i32,
    },
    /// The driver does not show the device.
    #[error("cuda:{ordinal}: the driver shows {} devices: {}", present.len(), present.join(", "))]
    NoDevice {
        /// Device asked for.
        ordinal: u32,
        /// Names of the devices found.
        present: Vec<String>,
    },
    /// The device lacks instructions that the kernels need.
    #[error("cuda:{ordinal} ({name}): compute capability {}.{}; {}.{} or newer is needed", found.0, found.1, needed.0, needed.1)]
    Capability {
        /// Device asked for.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Its capability.
        found: (u32, u32),
        /// The bound.
        needed: (u32, u32),
    },
    /// The driver refused.
    #[error("cuda:{ordinal}: {what}: {source}")]
    Driver {
        /// Device asked for.
        ordinal: u32,
        /// What was done.
        what: &'static str,
        /// What the driver said.
        source: DriverError,
    },
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// An opened GPU: its primary context and what the launches need to know of it.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// The primary context of the device. Events are recorded where we say so only.
    pub context: Arc<CudaContext>,
    /// Its number among the devices that the driver shows.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub processors: u32,
    /// Most shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

impl Gpu {
    /// A stream of its own.
    ///
    /// # Errors
    /// A stream that the driver refuses.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>, CudaError> {
        self.context.new_stream().doing("making a stream")
    }

    /// Opens device `ordinal` of those that the driver shows.
    ///
    /// # Errors
    /// What is missing, and what was looked for.
    pub fn open(ordinal: u32) -> Result<Self, OpenError> {
        let driver = |what| move |source| OpenError::Driver { ordinal, what, source };
        // SAFETY: loading a library runs its initialisers; these names belong to the CUDA driver alone.
        if !unsafe { sys::is_culib_present() } {
            let names = ["cuda", "nvcuda"].iter().flat_map(|name| cudarc::get_lib_name_candidates(name)).collect();
            return Err(OpenError::NoDriver { ordinal, names });
        }
        let mut found = 0;
        // SAFETY: `found` outlives the call.
        unsafe { sys::cuDriverGetVersion(&raw mut found) }.result().map_err(driver("asking for the driver's version"))?;
        if found < OLDEST_DRIVER {
            return Err(OpenError::DriverVersion { ordinal, found, needed: OLDEST_DRIVER });
        }
        result::init().map_err(driver("starting the driver"))?;
        let count = result::device::get_count().map_err(driver("counting devices"))?.max(0).cast_unsigned();
        if ordinal >= count {
            let name = |device: u32| result::device::get(device.cast_signed()).and_then(result::device::get_name);
            let present = (0..count).map(|device| name(device).unwrap_or_else(|error| error.to_string())).collect();
            return Err(OpenError::NoDevice { ordinal, present });
        }
        let context = CudaContext::new(ordinal as usize).map_err(driver("taking the primary context"))?;
        // SAFETY: nothing was allocated yet, and we order streams by events of our own.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(driver("asking for the name"))?;
        let attribute = |attribute, what| context.attribute(attribute).map(|value| value.max(0).cast_unsigned()).map_err(driver(what));
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "asking for the compute capability")?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "asking for the compute capability")?,
        );
        if capability < OLDEST_CAPABILITY {
            return Err(OpenError::Capability { ordinal, name, found: capability, needed: OLDEST_CAPABILITY });
        }
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "counting multiprocessors")?;
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, "asking for shared memory")?;
        Ok(Self { context, ordinal, name, capability, processors, shared_bytes })
    }
}
