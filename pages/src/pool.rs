//! Buffers that are made once and used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A fixed number of buffers of one capacity: the bound on memory of whoever takes from it.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    capacity: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug)]
struct State {
    free: Vec<Vec<u8>>,
    /// How many may still be made: they are made when first needed.
    unmade: usize,
}

/// A buffer, empty when taken. Goes back to its pool on drop.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    pool: Arc<Shared>,
}

impl Pool {
    /// A pool of `count` buffers of `capacity` bytes.
    pub fn new(count: usize, capacity: usize) -> Self {
        Self(Arc::new(Shared {
            capacity,
            state: Mutex::new(State {
                free: Vec::new(),
                unmade: count,
            }),
            returned: Condvar::new(),
        }))
    }

    /// Takes a buffer; blocks until there is one.
    pub fn take(&self) -> Buffer {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let none = |state: &mut State| state.free.is_empty() && state.unmade == 0;
        let waited = self.0.returned.wait_while(state, none);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let bytes = state.free.pop().unwrap_or_else(|| {
            state.unmade -= 1;
            Vec::with_capacity(self.0.capacity)
        });
        Buffer {
            bytes,
            pool: Arc::clone(&self.0),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let mut state = self
            .pool
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.free.push(bytes);
        drop(state);
        self.pool.returned.notify_one();
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taker_waits_until_a_buffer_comes_back() {
        let pool = Pool::new(1, 8);
        let mut first = pool.take();
        first.extend_from_slice(b"used");
        let other = pool.clone();
        let taker = std::thread::spawn(move || other.take().len());
        drop(first);
        assert_eq!(taker.join().unwrap(), 0);
    }
}
