//! Byte-pair encoding: training, encoding and decoding.
use pyo3::prelude::*;

#[pymodule]
fn _rustbpe(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
