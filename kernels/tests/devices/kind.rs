use sluice_kernels::device::cuda::{CudaError, OpenError};
use sluice_kernels::device::{DeviceError, DeviceKind, ParseDeviceError, open};

use crate::asked_for_cuda;

#[test]
fn names_parse_and_print_the_same() {
    for kind in DeviceKind::EVERYWHERE.into_iter().chain(asked_for_cuda().then_some(DeviceKind::Cuda { ordinal: 0 })) {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert!(open(kind, 1).expect("one thread").name().starts_with(&kind.to_string()));
    }
    for (text, ordinal) in [("cuda", 0), ("cuda:0", 0), ("cuda:17", 17)] {
        assert_eq!(text.parse(), Ok(DeviceKind::Cuda { ordinal }));
    }
    for text in ["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:4294967296", "cuda:0 "] {
        assert_eq!(text.parse::<DeviceKind>(), Err(ParseDeviceError { text: text.to_owned() }));
    }
}

#[test]
fn files_name_devices_as_people_do() {
    for (kind, text) in [(DeviceKind::Cpu, "\"cpu\""), (DeviceKind::Cuda { ordinal: 3 }, "\"cuda:3\"")] {
        assert_eq!(serde_json::to_string(&kind).expect("a name"), text);
        assert_eq!(serde_json::from_str::<DeviceKind>(text).expect("a kind"), kind);
    }
    assert!(serde_json::from_str::<DeviceKind>("\"gpu\"").expect_err("no device").to_string().contains("not one of reference, cpu"));
}

#[test]
fn a_missing_gpu_is_an_error_and_never_replaced() {
    let Err(error) = open(DeviceKind::Cuda { ordinal: 99 }, 1) else { panic!("no machine has a hundred devices") };
    let text = error.to_string();
    assert!(text.starts_with("device cuda:99: cuda:99: "), "{text}");
    let DeviceError::Cuda { source, .. } = error else { panic!("{text}") };
    match *source {
        CudaError::Open(OpenError::NoDriver { names, .. }) => {
            assert!(names.iter().any(|name| name == "libcuda.so.1") && text.contains("libcuda.so.1"), "{text}");
        }
        CudaError::Open(OpenError::NoDevice { present, .. }) => {
            assert!(text.contains(&format!("shows {} devices", present.len())), "{text}")
        }
        // A driver without any device refuses to start.
        CudaError::Open(OpenError::Driver { .. } | OpenError::DriverVersion { .. }) => {}
        other => panic!("{other}"),
    }
}

#[test]
fn thread_counts_have_bounds() {
    for threads in [0, 257] {
        assert!(matches!(open(DeviceKind::Cpu, threads), Err(DeviceError::Threads { threads: given, max: 256 }) if given == threads));
    }
}
