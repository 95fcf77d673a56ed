//! What Python sees: the module `vibechat._rustbpe`, typed in `vibechat/_rustbpe.pyi`.

use std::borrow::Cow;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyMemoryError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::count::{count_chunks, Batch};
use crate::encode::Vocabulary;
use crate::merge::Merger;
use crate::split::{Splitter, PATTERN};

const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The text as UTF-8. Python strings may hold lone surrogates, which are no characters: each becomes U+FFFD, and two
/// that make a pair become the character they mean (tiktoken does the same).
fn utf8<'a>(text: &'a Bound<'_, PyString>) -> PyResult<Cow<'a, str>> {
    match text.to_str() {
        Ok(valid) => Ok(Cow::Borrowed(valid)),
        Err(error) if error.is_instance_of::<PyUnicodeEncodeError>(text.py()) => {
            let utf16 = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
            Ok(Cow::Owned(utf16.call_method1("decode", ("utf-16", "replace"))?.extract()?))
        }
        Err(error) => Err(error),
    }
}

fn threads_or_all(num_threads: usize) -> usize {
    if num_threads > 0 {
        num_threads
    } else {
        available_parallelism().map_or(1, Into::into)
    }
}

/// Calls the Python callable `progress(stage, done, total)` every tenth of a second, and sees to Ctrl-C.
struct Progress {
    callable: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    fn report(&mut self, stage: &str, done: usize, total: usize) -> PyResult<()> {
        if self.last.elapsed() < PROGRESS_EVERY && done != total {
            return Ok(());
        }
        self.last = Instant::now();
        Python::attach(|py| {
            py.check_signals()?;
            self.callable.as_ref().map_or(Ok(()), |call| call.call1(py, (stage, done, total)).map(|_| ()))
        })
    }
}

/// See `train` in the stub.
#[pyfunction]
#[pyo3(signature = (texts, vocab_size, num_threads=0, progress=None))]
fn train<'py>(
    py: Python<'py>,
    texts: &Bound<'py, PyAny>,
    vocab_size: usize,
    num_threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyList>> {
    if !(256..1 << 31).contains(&vocab_size) {
        return Err(PyValueError::new_err(format!("vocab_size {vocab_size} is not in 256 .. 2^31")));
    }
    let texts: Py<PyIterator> = texts.try_iter()?.unbind();
    let mut progress = Progress { callable: progress, last: Instant::now() };
    let tokens = py.detach(|| -> PyResult<Vec<Vec<u8>>> {
        let mut bytes_read = 0;
        let counts = count_chunks(threads_or_all(num_threads), || {
            let batch = Python::attach(|py| next_batch(texts.bind(py)))?;
            bytes_read += batch.bytes();
            progress.report("reading", bytes_read, 0)?;
            Ok::<_, PyErr>((!batch.is_empty()).then_some(batch))
        })?;
        let too_much = || PyMemoryError::new_err("more than 4 GB of distinct chunks: train on less text (--max-chars)");
        let mut merger = Merger::new(&counts).ok_or_else(too_much)?;
        drop(counts);
        merger.grow(vocab_size, |tokens| progress.report("merging", tokens, vocab_size))?;
        Ok(merger.into_tokens())
    })?;
    PyList::new(py, tokens.iter().map(|token| PyBytes::new(py, token)))
}

fn fill(buffer: &mut [u8], ids: &[u32]) -> PyResult<()> {
    for (four, id) in buffer.chunks_exact_mut(4).zip(ids) {
        four.copy_from_slice(&id.to_ne_bytes());
    }
    Ok(())
}

fn next_batch(texts: &Bound<'_, PyIterator>) -> PyResult<Batch> {
    let mut batch = Batch::default();
    while !batch.is_full() {
        let Some(text) = texts.clone().next() else { break };
        batch.push(utf8(text?.cast::<PyString>()?)?.as_bytes());
    }
    Ok(batch)
}

/// See `split` in the stub.
#[pyfunction]
fn split(text: &Bound<'_, PyString>) -> PyResult<Vec<String>> {
    let text = utf8(text)?;
    let mut chunks = Vec::new();
    Splitter::default().for_each(text.as_bytes(), |start, end| chunks.push(text[start..end].to_owned()));
    Ok(chunks)
}

/// See `Encoder` in the stub.
#[pyclass(frozen, module = "vibechat._rustbpe")]
struct Encoder {
    vocabulary: Vocabulary,
    integers: Vec<Py<PyInt>>, // each id as a Python int, made once: a list of ids is then made of references
}

impl Encoder {
    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, ids.iter().map(|&id| self.integers[id as usize].bind(py)))
    }

    fn check(&self, id: Option<u32>) -> PyResult<()> {
        match id {
            Some(id) if id as usize >= self.vocabulary.size() => Err(self.unknown(id)),
            _ => Ok(()),
        }
    }

    fn unknown(&self, id: u32) -> PyErr {
        PyValueError::new_err(format!("there is no token {id}: the vocabulary has {}", self.vocabulary.size()))
    }
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (tokens, special_tokens=Vec::new()))]
    fn new(py: Python<'_>, tokens: Vec<Vec<u8>>, special_tokens: Vec<String>) -> PyResult<Self> {
        let vocabulary = py.detach(|| Vocabulary::new(&tokens, &special_tokens)).map_err(PyValueError::new_err)?;
        let integers =
            (0..vocabulary.size()).map(|id| id.into_pyobject(py).map(Bound::unbind)).collect::<Result<_, _>>()?;
        Ok(Self { vocabulary, integers })
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocabulary.size()
    }

    fn encode<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        let text = utf8(text)?;
        let mut ids = Vec::new();
        py.detach(|| self.vocabulary.encode(text.as_bytes(), &mut ids));
        self.list(py, &ids)
    }

    fn encode_bytes<'py>(&self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyList>> {
        let mut ids = Vec::new();
        py.detach(|| self.vocabulary.encode(data, &mut ids));
        self.list(py, &ids)
    }

    #[pyo3(signature = (texts, num_threads=0, prepend=None, append=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        num_threads: usize,
        prepend: Option<u32>,
        append: Option<u32>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.check(prepend)?;
        self.check(append)?;
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
        let threads = threads_or_all(num_threads);
        let encoded = py.detach(|| self.vocabulary.encode_batch(&bytes, threads, (prepend, append)));
        let lists = encoded.iter().map(|ids| self.list(py, ids)).collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, lists)
    }

    #[pyo3(signature = (texts, num_threads=0))]
    fn encode_batch_to_buffers<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        num_threads: usize,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
        let threads = threads_or_all(num_threads);
        let encoded = py.detach(|| self.vocabulary.encode_batch(&bytes, threads, (None, None)));
        encoded.iter().map(|ids| PyBytes::new_with(py, 4 * ids.len(), |buffer| fill(buffer, ids))).collect()
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.vocabulary.decode(&ids).map_err(|id| self.unknown(id))?;
        Ok(PyBytes::new(py, &bytes))
    }
}

#[pymodule]
fn _rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("PATTERN", PATTERN)?;
    module.add_function(wrap_pyfunction!(train, module)?)?;
    module.add_function(wrap_pyfunction!(split, module)?)?;
    module.add_class::<Encoder>()
}
