//! Unpacked units, kept for a while: the last ones used, within a budget of bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// Which unit: the layer, its token, and the length that the layer claimed.
pub(crate) type UnitKey = (u16, u64, u32);

/// A cache of unpacked units, least recently used out first.
#[derive(Debug)]
pub(crate) struct UnitCache {
    budget: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    units: HashMap<UnitKey, (u64, Arc<[u8]>)>,
    /// Keys by the time of their last use.
    order: BTreeMap<u64, UnitKey>,
    clock: u64,
    bytes: usize,
}

impl UnitCache {
    /// A cache that keeps at most `budget` bytes of units. 0 keeps nothing.
    pub(crate) fn new(budget: usize) -> Self {
        Self { budget, inner: Mutex::default() }
    }

    pub(crate) fn get(&self, key: UnitKey) -> Option<Arc<[u8]>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Inner { units, order, clock, .. } = &mut *inner;
        let (time, bytes) = units.get_mut(&key)?;
        order.remove(time);
        *clock += 1;
        *time = *clock;
        order.insert(*clock, key);
        Some(Arc::clone(bytes))
    }

    pub(crate) fn insert(&self, key: UnitKey, bytes: Arc<[u8]>) {
        if bytes.len() > self.budget {
            return;
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Inner { units, order, clock, bytes: used } = &mut *inner;
        *clock += 1;
        *used += bytes.len();
        order.insert(*clock, key);
        if let Some((time, old)) = units.insert(key, (*clock, bytes)) {
            order.remove(&time);
            *used = used.saturating_sub(old.len());
        }
        while *used > self.budget {
            let Some((_, oldest)) = order.pop_first() else { break };
            if let Some((_, old)) = units.remove(&oldest) {
                *used = used.saturating_sub(old.len());
            }
        }
    }

    /// Forgets all units.
    pub(crate) fn clear(&self) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Inner::default();
    }

    /// Bytes of units that are kept now.
    pub(crate) fn bytes(&self) -> usize {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }
}
