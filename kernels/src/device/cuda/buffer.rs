//! Memory that the device reads or writes: its own, pinned host memory, and registered ranges of files mapped by others.
//!
//! All of it is allocated at set-up and freed with its value; freeing device memory waits for the device. Kernels get plain addresses, so
//! the owner of a buffer keeps it until the launches that use it are done. What lies in device memory is changed through shared references:
//! streams order its readers and writers, and no reference to it exists on the host.

use std::any::Any;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::error::{CudaError, Doing};

/// Bytes registered in one call.
const PIECE_BYTES: usize = 1 << 30;

/// Elements in device memory.
#[derive(Debug)]
pub struct DeviceBuffer<T> {
    context: Arc<CudaContext>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// `len` zeros, for whatever `stream` does from here on, and for other streams that it is joined to. (The driver's default stream would
    /// order them for all, but cannot be used, nor the device be waited for, while any thread captures a graph.)
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn zeroed(stream: &CudaStream, len: usize) -> Result<Self, CudaError> {
        let buffer = Self::uninitialised(stream.context(), len)?;
        buffer.clear(stream, 0..len)?;
        Ok(buffer)
    }

    /// `len` elements of which every bit is one, as [`DeviceBuffer::zeroed`].
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn filled(stream: &CudaStream, len: usize) -> Result<Self, CudaError> {
        let buffer = Self::uninitialised(stream.context(), len)?;
        buffer.fill(stream, 0..len)?;
        Ok(buffer)
    }

    /// `len` elements of any content; all bit patterns are values of a plain-data type.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn uninitialised(context: &Arc<CudaContext>, len: usize) -> Result<Self, CudaError> {
        let bytes = len * size_of::<T>();
        let mut address = 0;
        context.bind_to_thread().doing("entering the context")?;
        if bytes > 0 {
            // SAFETY: `address` outlives the call.
            unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }.result().map_err(refused(context, "device memory", bytes))?;
        }
        Ok(Self { context: Arc::clone(context), address, len, element: PhantomData })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// Memory that the device does not have, or a failed copy.
    pub fn from_slice(stream: &CudaStream, values: &[T]) -> Result<Self, CudaError> {
        let buffer = Self::uninitialised(stream.context(), values.len())?;
        buffer.write(stream, 0, values)?;
        Ok(buffer)
    }

    /// Makes room for `len` elements; the content is lost where the buffer was too small. For staging, not for steps.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn fit(&mut self, len: usize) -> Result<(), CudaError> {
        if len > self.len {
            let context = Arc::clone(&self.context);
            // The old memory goes first, so that both need not fit at once.
            *self = Self::uninitialised(&context, 0)?;
            *self = Self::uninitialised(&context, len.next_power_of_two())?;
        }
        Ok(())
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Address of the first element, for kernels; zero without elements.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Address of element `index`, which may be the end.
    #[must_use]
    pub fn address_of(&self, index: usize) -> u64 {
        assert!(index <= self.len, "element {index} of {}", self.len);
        self.address + (index * size_of::<T>()) as u64
    }

    /// Copies `values` to the elements from `first` on, after all earlier work of `stream`, and waits for it.
    ///
    /// # Errors
    /// A failed copy, or an earlier failure of the device.
    pub fn write(&self, stream: &CudaStream, first: usize, values: &[T]) -> Result<(), CudaError> {
        // SAFETY: the values are borrowed until the stream has been waited for.
        unsafe { self.write_async(stream, first, values) }?;
        stream.synchronize().doing("copying to the device")
    }

    /// Enqueues the copy of `values` to the elements from `first` on.
    ///
    /// # Safety
    /// `values` stay as they are until the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub unsafe fn write_async(&self, stream: &CudaStream, first: usize, values: &[T]) -> Result<(), CudaError> {
        let bytes = size_of_val(values);
        let to = self.checked(first, values.len());
        self.context.bind_to_thread().doing("entering the context")?;
        if bytes > 0 {
            // SAFETY: the destination lies in the buffer, the source lives long enough by the caller's promise.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, values.as_ptr().cast(), bytes, stream.cu_stream()) }
                .result()
                .doing("copying to the device")?;
        }
        Ok(())
    }

    /// Copies the elements from `first` on into `values`, after all earlier work of `stream`, and waits for it.
    ///
    /// # Errors
    /// A failed copy, or an earlier failure of the device.
    pub fn read(&self, stream: &CudaStream, first: usize, values: &mut [T]) -> Result<(), CudaError> {
        // SAFETY: the values are borrowed until the stream has been waited for.
        unsafe { self.read_async(stream, first, values) }?;
        stream.synchronize().doing("copying from the device")
    }

    /// Enqueues the copy of the elements from `first` on into `values`.
    ///
    /// # Safety
    /// `values` are neither read nor written by others until the stream has passed this point.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub unsafe fn read_async(&self, stream: &CudaStream, first: usize, values: &mut [T]) -> Result<(), CudaError> {
        let bytes = size_of_val(values);
        let from = self.checked(first, values.len());
        self.context.bind_to_thread().doing("entering the context")?;
        if bytes > 0 {
            // SAFETY: the source lies in the buffer, the destination lives long enough by the caller's promise.
            unsafe { sys::cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), from, bytes, stream.cu_stream()) }
                .result()
                .doing("copying from the device")?;
        }
        Ok(())
    }

    /// Enqueues the copy of elements of another buffer, of `range` there, to the elements from `first` on.
    ///
    /// # Errors
    /// A copy that the driver refuses.
    pub fn copy_from(&self, stream: &CudaStream, first: usize, other: &Self, range: Range<usize>) -> Result<(), CudaError> {
        let (to, from) = (self.checked(first, range.len()), other.checked(range.start, range.len()));
        self.context.bind_to_thread().doing("entering the context")?;
        if !range.is_empty() {
            // SAFETY: both ranges lie in their buffers, and freeing a buffer waits for the device.
            unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, range.len() * size_of::<T>(), stream.cu_stream()) }
                .result()
                .doing("copying on the device")?;
        }
        Ok(())
    }

    /// Enqueues zeros into the elements of `range`.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub fn clear(&self, stream: &CudaStream, range: Range<usize>) -> Result<(), CudaError> {
        self.set_bytes(stream, range, 0)
    }

    /// Enqueues ones into every bit of the elements of `range`.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub fn fill(&self, stream: &CudaStream, range: Range<usize>) -> Result<(), CudaError> {
        self.set_bytes(stream, range, 0xFF)
    }

    fn set_bytes(&self, stream: &CudaStream, range: Range<usize>, byte: u8) -> Result<(), CudaError> {
        let to = self.checked(range.start, range.len());
        self.context.bind_to_thread().doing("entering the context")?;
        if !range.is_empty() {
            // SAFETY: the range lies in the buffer.
            unsafe { sys::cuMemsetD8Async(to, byte, range.len() * size_of::<T>(), stream.cu_stream()) }
                .result()
                .doing("setting device memory")?;
        }
        Ok(())
    }

    /// Enqueues `value` into the elements of `range`. Elements have four bytes.
    ///
    /// # Errors
    /// A call that the driver refuses.
    pub fn set(&self, stream: &CudaStream, range: Range<usize>, value: T) -> Result<(), CudaError> {
        let to = self.checked(range.start, range.len());
        self.context.bind_to_thread().doing("entering the context")?;
        if !range.is_empty() {
            let bits: u32 = bytemuck::cast(value);
            // SAFETY: the range lies in the buffer, whose elements have four bytes (the cast has made sure).
            unsafe { sys::cuMemsetD32Async(to, bits, range.len(), stream.cu_stream()) }.result().doing("setting device memory")?;
        }
        Ok(())
    }

    fn checked(&self, first: usize, len: usize) -> u64 {
        assert!(first <= self.len && len <= self.len - first, "elements {first}..{first}+{len} of {}", self.len);
        self.address_of(first)
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            self.context.record_err(self.context.bind_to_thread());
            // SAFETY: the address came from cuMemAlloc and is freed once.
            self.context.record_err(unsafe { sys::cuMemFree_v2(self.address) }.result());
        }
    }
}

/// Elements in pinned host memory, which the device reads and writes too.
#[derive(Debug)]
pub struct PinnedBuffer<T> {
    context: Arc<CudaContext>,
    first: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory, as a Vec does.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}
// SAFETY: shared references give shared references to the elements only.
unsafe impl<T: Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// Memory that cannot be pinned.
    pub fn zeroed(context: &Arc<CudaContext>, len: usize) -> Result<Self, CudaError> {
        let bytes = (len * size_of::<T>()).max(1);
        let mut first: *mut c_void = ptr::null_mut();
        context.bind_to_thread().doing("entering the context")?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `first` outlives the call.
        unsafe { sys::cuMemHostAlloc(&raw mut first, bytes, flags) }.result().map_err(refused(context, "pinned memory", bytes))?;
        // SAFETY: the allocation has this many bytes.
        unsafe { ptr::write_bytes(first.cast::<u8>(), 0, bytes) };
        let first = NonNull::new(first.cast()).expect("an allocation that succeeded has an address");
        Ok(Self { context: Arc::clone(context), first, len })
    }

    /// Address of the first element for kernels: host addresses are device addresses on every 64-bit Linux driver.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.first.as_ptr() as u64
    }
}

impl<T> Deref for PinnedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements are owned by this value.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements are owned by this value, which is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: the memory came from cuMemHostAlloc and is freed once.
        self.context.record_err(unsafe { sys::cuMemFreeHost(self.first.as_ptr().cast()) }.result());
    }
}

/// How the device may use a registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccess {
    /// Kernels read; a write faults. The mapping itself may be read-only.
    Read,
    /// Kernels read and write.
    Write,
}

/// A mapped range of host memory that the device reads where it lies, registered in pieces of 1 GiB. Unregistered with this value.
pub struct RegisteredRange {
    context: Arc<CudaContext>,
    first: *const u8,
    len: usize,
    /// Device address of each piece.
    pieces: Vec<u64>,
    /// Keeps the mapping.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the range is only named to the driver, and the owner may move between threads.
unsafe impl Send for RegisteredRange {}
// SAFETY: nothing is changed through shared references.
unsafe impl Sync for RegisteredRange {}

impl RegisteredRange {
    /// Registers `len` bytes from `first` on, which begin on a page boundary.
    ///
    /// # Safety
    /// The range is mapped for as long as `owner` lives.
    ///
    /// # Errors
    /// A registration that the driver refuses.
    pub unsafe fn register(
        context: &Arc<CudaContext>,
        first: *const u8,
        len: usize,
        access: HostAccess,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, CudaError> {
        let mut flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        if access == HostAccess::Read {
            flags |= sys::CU_MEMHOSTREGISTER_READ_ONLY;
        }
        context.bind_to_thread().doing("entering the context")?;
        // Dropping the value on an error unregisters the pieces that it has.
        let mut range = Self { context: Arc::clone(context), first, len, pieces: Vec::new(), _owner: owner };
        for offset in (0..len).step_by(PIECE_BYTES) {
            let bytes = PIECE_BYTES.min(len - offset);
            // SAFETY: the piece lies in the range.
            let piece = unsafe { first.add(offset) }.cast_mut().cast::<c_void>();
            // SAFETY: the piece is mapped, by the caller's promise.
            unsafe { sys::cuMemHostRegister_v2(piece, bytes, flags) }.result().map_err(refused(context, "registration", bytes))?;
            range.pieces.push(0);
            let mut address = 0;
            // SAFETY: the piece is registered and `address` outlives the call.
            unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, piece, 0) }.result().doing("asking for a device address")?;
            if let Some(last) = range.pieces.last_mut() {
                *last = address;
            }
        }
        Ok(range)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the byte at `offset`. Neighbours in different pieces need not be neighbours on the device.
    #[must_use]
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset < self.len, "offset {offset} of {}", self.len);
        self.pieces[offset / PIECE_BYTES] + (offset % PIECE_BYTES) as u64
    }
}

impl Drop for RegisteredRange {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        for piece in 0..self.pieces.len() {
            // SAFETY: the piece lies in the range, was registered by this value and is unregistered once.
            let result = unsafe { sys::cuMemHostUnregister(self.first.add(piece * PIECE_BYTES).cast_mut().cast()) };
            self.context.record_err(result.result());
        }
    }
}

/// Enqueues a copy between device memory and registered host memory, or within either.
///
/// # Safety
/// Both ranges are valid until the stream has passed this point.
///
/// # Errors
/// A copy that the driver refuses.
pub unsafe fn copy(stream: &CudaStream, to: u64, from: u64, bytes: u64) -> Result<(), CudaError> {
    // SAFETY: the caller's promise; registered host addresses are device addresses too.
    unsafe { sys::cuMemcpyAsync(to, from, bytes as usize, stream.cu_stream()) }.result().doing("copying across the link")
}

/// Whether host memory at `address` is pinned or registered, so that it is copied without the processor.
pub(super) fn is_pinned(address: *const u8) -> bool {
    let mut kind = 0u32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: `kind` has the four bytes of a memory type and outlives the call, which only compares the address.
    let result = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, address as u64) };
    result.result().is_ok() && kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u32
}

/// An allocation error with what the device has.
fn refused<'a>(context: &'a Arc<CudaContext>, what: &'static str, bytes: usize) -> impl FnOnce(DriverError) -> CudaError + 'a {
    move |source| {
        let (free, total) = context.mem_get_info().unwrap_or_default();
        CudaError::Memory { what, bytes, free, total, source }
    }
}
