//! CUDA sources to machine code, by NVRTC, with a cache on disk. Needs no GPU.
//!
//! The library is loaded by ourselves rather than by cudarc, because its path must be choosable and a missing one must be an error.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::Library;
use thiserror::Error;

/// Names a library of NVRTC to use instead of the ones that a machine usually has.
pub const LIBRARY_VARIABLE: &str = "SLUICE_NVRTC";

/// Names the folder of compiled kernels.
pub const CACHE_VARIABLE: &str = "SLUICE_KERNEL_CACHE";

/// Oldest NVRTC: the first that knows every target and every PTX instruction we use.
const OLDEST_VERSION: (i32, i32) = (12, 0);

/// Where NVRTC is looked for when the environment names none: the dynamic linker's folders, then those of a toolkit.
const LIBRARIES: [&str; 7] = [
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so",
    "/usr/local/cuda/lib64/libnvrtc.so.13",
    "/usr/local/cuda/lib64/libnvrtc.so.12",
    "/usr/local/cuda/lib64/libnvrtc.so",
    "/usr/lib/x86_64-linux-gnu/libnvrtc.so",
];

/// First bytes of a cache file; the number changes when its format does.
const CACHE_MAGIC: &[u8] = b"sluice-cubin-1\n";

/// Kernels that could not be compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    /// No library of NVRTC loads.
    #[error("nvrtc: looked for {}; none of them loads: {reason}", names.join(", "))]
    NoLibrary {
        /// Names tried.
        names: Vec<String>,
        /// Why the first did not load.
        reason: String,
    },
    /// The library lacks a function.
    #[error("nvrtc: {path} has no function {function}")]
    NoFunction {
        /// The library.
        path: String,
        /// The function.
        function: &'static str,
    },
    /// The library is too old.
    #[error("nvrtc: {path} is version {}.{}; {}.{} or newer is needed", found.0, found.1, needed.0, needed.1)]
    Version {
        /// The library.
        path: String,
        /// Its version.
        found: (i32, i32),
        /// The bound.
        needed: (i32, i32),
    },
    /// The source does not compile.
    #[error("nvrtc: {name} for {target} with {options}: {reason}\n{log}")]
    Source {
        /// The source's name.
        name: String,
        /// The target.
        target: Target,
        /// The options.
        options: String,
        /// The function that failed and its code.
        reason: String,
        /// NVRTC's own words.
        log: String,
    },
}

/// A compute capability to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Major and minor.
    pub capability: (u32, u32),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.capability.0, self.capability.1)
    }
}

/// A source with all that its machine code depends on, but for target and compiler.
#[derive(Clone, Debug)]
pub struct Program<'a> {
    /// File name, for messages.
    pub name: &'a str,
    /// The source.
    pub source: &'a str,
    /// Headers that it may include: name and text.
    pub headers: &'a [(&'a str, &'a str)],
    /// Options of NVRTC, without the target.
    pub options: Vec<String>,
}

/// The compiler and the folder of what it has compiled.
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// The library named by `SLUICE_NVRTC`, else the first that loads of those a machine usually has; the cache folder named by
    /// `SLUICE_KERNEL_CACHE`, else the user's cache folder.
    ///
    /// # Errors
    /// No library, and where it was looked for.
    pub fn find() -> Result<Self, CompileError> {
        let names = match std::env::var(LIBRARY_VARIABLE) {
            Ok(path) => vec![path],
            Err(_) => LIBRARIES.map(str::to_owned).to_vec(),
        };
        Ok(Self { nvrtc: Nvrtc::load(names)?, cache: cache_folder() })
    }

    /// The same compiler with another cache folder, or none.
    #[must_use]
    pub fn with_cache(mut self, cache: Option<PathBuf>) -> Self {
        self.cache = cache;
        self
    }

    /// Version of NVRTC: major, minor.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.nvrtc.version
    }

    /// Machine code (CUBIN) of `program` for `target`, from the cache where it lies there whole. A cache that cannot be written is none.
    ///
    /// # Errors
    /// What NVRTC says of the source.
    pub fn compile(&self, program: &Program, target: Target) -> Result<Vec<u8>, CompileError> {
        let file = self.cache.as_ref().map(|folder| folder.join(self.cache_name(program, target)));
        if let Some(cubin) = file.as_deref().and_then(read_cached) {
            return Ok(cubin);
        }
        let cubin = self.nvrtc.compile(program, target)?;
        if let Some(file) = &file {
            // Without a cache every start compiles anew, which is slower and nothing else.
            let _ = write_cached(file, &cubin);
        }
        Ok(cubin)
    }

    /// A name of everything that the machine code depends on.
    fn cache_name(&self, program: &Program, target: Target) -> String {
        let mut hasher = blake3::Hasher::new();
        let version = format!("{}.{}", self.nvrtc.version.0, self.nvrtc.version.1);
        let target = target.to_string();
        let headers = program.headers.iter().flat_map(|&(name, text)| [name, text]);
        let options = program.options.iter().map(String::as_str);
        for part in [version.as_str(), &target, program.name, program.source].into_iter().chain(headers).chain(options) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        format!("{}-{target}-{}.cubin", program.name.trim_end_matches(".cu"), &hasher.finalize().to_hex()[..32])
    }
}

fn cache_folder() -> Option<PathBuf> {
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    named(CACHE_VARIABLE)
        .or_else(|| named("XDG_CACHE_HOME").map(|folder| folder.join("sluice").join("kernels")))
        .or_else(|| named("HOME").map(|folder| folder.join(".cache").join("sluice").join("kernels")))
}

/// The content of a cache file whose checksum fits.
fn read_cached(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (digest, cubin) = bytes.strip_prefix(CACHE_MAGIC)?.split_first_chunk::<32>()?;
    (blake3::hash(cubin).as_bytes() == digest).then(|| cubin.to_vec())
}

/// Writes under a temporary name first, so that a reader sees a whole file or none.
fn write_cached(file: &Path, cubin: &[u8]) -> std::io::Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = folder.join(format!(".{}-{}", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
    let written = fs::File::create(&temporary).and_then(|mut to| {
        to.write_all(CACHE_MAGIC)?;
        to.write_all(blake3::hash(cubin).as_bytes())?;
        to.write_all(cubin)
    });
    let renamed = written.and_then(|()| fs::rename(&temporary, file));
    if renamed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

/// An NVRTC program handle.
type Handle = *mut std::ffi::c_void;

/// The functions of a loaded library. `nvrtcResult` is an `int`, 0 for success.
struct Nvrtc {
    path: String,
    version: (i32, i32),
    create: unsafe extern "C" fn(*mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Keeps the functions loaded.
    _library: Library,
}

/// A program handle that is destroyed with this value.
struct Compilation<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
}

impl Drop for Compilation<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle was created by this library and is destroyed once.
        unsafe { (self.nvrtc.destroy)(&raw mut self.handle) };
    }
}

impl Nvrtc {
    fn load(names: Vec<String>) -> Result<Self, CompileError> {
        let mut reason = None;
        for name in &names {
            // SAFETY: the name is NVRTC's, or was given by the user as its path; its initialisers have no preconditions.
            match unsafe { Library::new(name) } {
                Ok(library) => return Self::with_library(name.clone(), library),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                    reason = reason.or(Some(cause));
                }
            }
        }
        Err(CompileError::NoLibrary { names, reason: reason.unwrap_or_default() })
    }

    fn with_library(path: String, library: Library) -> Result<Self, CompileError> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types of the struct's fields are those of nvrtc.h.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|_| CompileError::NoFunction { path: path.clone(), function: $name })?
            };
        }
        let ask_version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = function!("nvrtcVersion");
        let mut version = (0, 0);
        // SAFETY: both numbers outlive the call.
        unsafe { ask_version(&raw mut version.0, &raw mut version.1) };
        if version < OLDEST_VERSION {
            return Err(CompileError::Version { path, found: version, needed: OLDEST_VERSION });
        }
        Ok(Self {
            version,
            create: function!("nvrtcCreateProgram"),
            compile: function!("nvrtcCompileProgram"),
            log_size: function!("nvrtcGetProgramLogSize"),
            log: function!("nvrtcGetProgramLog"),
            cubin_size: function!("nvrtcGetCUBINSize"),
            cubin: function!("nvrtcGetCUBIN"),
            destroy: function!("nvrtcDestroyProgram"),
            error_string: function!("nvrtcGetErrorString"),
            path,
            _library: library,
        })
    }

    fn compile(&self, program: &Program, target: Target) -> Result<Vec<u8>, CompileError> {
        let failed = |function: &str, code: c_int, log: String| CompileError::Source {
            name: program.name.to_owned(),
            target,
            options: program.options.join(" "),
            reason: format!("{function} of {}: {}", self.path, self.words(code)),
            log,
        };
        let options: Vec<String> = program.options.iter().cloned().chain([format!("--gpu-architecture={target}")]).collect();
        let (source, name) = (c_string(program.source), c_string(program.name));
        let header_names: Vec<CString> = program.headers.iter().map(|header| c_string(header.0)).collect();
        let header_texts: Vec<CString> = program.headers.iter().map(|header| c_string(header.1)).collect();
        let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
        let (names, texts, options) = (pointers(&header_names), pointers(&header_texts), pointers(&options));

        let mut compilation = Compilation { nvrtc: self, handle: ptr::null_mut() };
        let count = program.headers.len() as c_int;
        // SAFETY: all strings end in zero and live until this function returns, the program is destroyed before them.
        let code =
            unsafe { (self.create)(&raw mut compilation.handle, source.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr()) };
        if code != 0 {
            return Err(failed("nvrtcCreateProgram", code, String::new()));
        }
        // SAFETY: the handle is valid, the options end in zero.
        let code = unsafe { (self.compile)(compilation.handle, options.len() as c_int, options.as_ptr()) };
        if code != 0 {
            let log = self.fetch(&compilation, self.log_size, self.log).unwrap_or_default();
            return Err(failed("nvrtcCompileProgram", code, String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()));
        }
        self.fetch(&compilation, self.cubin_size, self.cubin).map_err(|code| failed("nvrtcGetCUBIN", code, String::new()))
    }

    /// What the library gives as a size and then as bytes.
    fn fetch(
        &self,
        compilation: &Compilation,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        bytes: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, c_int> {
        let mut len = 0;
        // SAFETY: the handle is valid and `len` outlives the call.
        let code = unsafe { size(compilation.handle, &raw mut len) };
        if code != 0 {
            return Err(code);
        }
        let mut result = vec![0u8; len];
        // SAFETY: the library writes as many bytes as it has just said.
        match unsafe { bytes(compilation.handle, result.as_mut_ptr().cast()) } {
            0 => Ok(result),
            code => Err(code),
        }
    }

    fn words(&self, code: c_int) -> String {
        // SAFETY: the function gives a constant string for every number.
        unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned()
    }
}

/// Our sources and options contain no zero; what follows one would be cut off.
fn c_string(text: &str) -> CString {
    CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}
