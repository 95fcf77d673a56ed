//! Byte-pair encoding for vibechat: training, encoding and decoding.
//!
//! Read in this order: `classes` (what kind of character), `split` (text -> chunks), `table` (fast maps), `count` and
//! `merge` (training), `encode`, `python` (what Python sees as `vibechat._rustbpe`).

pub mod classes;
pub mod count;
pub mod encode;
pub mod merge;
#[cfg(feature = "pyo3")]
mod python;
pub mod split;
pub mod table;
