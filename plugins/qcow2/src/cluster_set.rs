//! A set of clusters of the file, in runs: what was freed mostly lies together.

use alloc::collections::BTreeMap;
use core::mem;
use core::ops::Range;

/// Clusters by number. No two runs touch.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    /// The end of each run, by its first cluster.
    runs: BTreeMap<u64, u64>,
}

impl ClusterSet {
    /// Adds a cluster. False, and nothing is added, if that would be a run more than `most`.
    pub(crate) fn insert(&mut self, cluster: u64, most: usize) -> bool {
        let end = cluster.saturating_add(1);
        let first = match self.run_up_to(cluster) {
            Some(run) if run.end > cluster => return true,
            Some(run) if run.end == cluster => run.start,
            _ => cluster,
        };
        let after = self.runs.remove(&end);
        if first == cluster && after.is_none() && self.runs.len() >= most {
            return false;
        }
        self.runs.insert(first, after.unwrap_or(end));
        true
    }

    /// Removes clusters. Where they are in the middle of a run, there are two then; if that would be a run more than
    /// `most`, the first of the two goes as well.
    pub(crate) fn remove(&mut self, clusters: Range<u64>, most: usize) {
        while let Some(last) = clusters.end.checked_sub(1)
            && let Some(run) = self.run_up_to(last).filter(|run| run.end > clusters.start && !clusters.is_empty())
        {
            self.runs.remove(&run.start);
            if run.end > clusters.end {
                self.runs.insert(clusters.end, run.end);
            }
            if run.start < clusters.start && self.runs.len() < most {
                self.runs.insert(run.start, clusters.start);
            }
        }
    }

    /// Where the run ends that a cluster is in.
    pub(crate) fn end_of(&self, cluster: u64) -> Option<u64> {
        self.run_up_to(cluster).map(|run| run.end).filter(|end| *end > cluster)
    }

    /// Adds all clusters between the first and the last one.
    pub(crate) fn fill(&mut self) {
        if let (Some((&first, _)), Some((_, &end))) = (self.runs.first_key_value(), self.runs.last_key_value()) {
            self.runs = BTreeMap::from([(first, end)]);
        }
    }

    /// Takes all runs out, in order.
    pub(crate) fn take(&mut self) -> impl ExactSizeIterator<Item = Range<u64>> + use<> {
        mem::take(&mut self.runs).into_iter().map(|(first, end)| first..end)
    }

    /// The last run that begins at a cluster or before.
    fn run_up_to(&self, cluster: u64) -> Option<Range<u64>> {
        self.runs.range(..=cluster).next_back().map(|(first, end)| *first..*end)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use alloc::collections::BTreeSet;
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn a_set_is_what_a_list_of_clusters_is() {
        let (mut set, mut list) = (ClusterSet::default(), BTreeSet::new());
        let mut random = 1_u64;
        for step in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let cluster = (random >> 33) % 200;
            if step % 3 == 0 {
                let clusters = cluster..cluster + (random >> 60);
                clusters.clone().for_each(|cluster| _ = list.remove(&cluster));
                set.remove(clusters, usize::MAX);
            } else {
                assert!(set.insert(cluster, usize::MAX));
                list.insert(cluster);
            }
            let runs: Vec<_> = set.runs.iter().map(|(first, end)| *first..*end).collect();
            assert!(runs.iter().all(|run| !run.is_empty()), "{runs:?}");
            assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{runs:?}");
            assert!(runs.iter().cloned().flatten().eq(list.iter().copied()), "{runs:?} {list:?}");
            assert_eq!(set.end_of(cluster).is_some(), list.contains(&cluster));
        }
        assert!(set.take().flatten().eq(list));
        assert_eq!(set.take().len(), 0);
    }

    #[test]
    fn there_are_no_more_runs_than_wanted() {
        let mut set = ClusterSet::default();
        for cluster in [10, 20, 30] {
            assert!(set.insert(cluster, 3));
        }
        assert!(!set.insert(40, 3), "one more");
        // What makes a run longer, or one of two, or is there already.
        for cluster in [9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20] {
            assert!(set.insert(cluster, 3));
        }
        assert!(set.insert(40, 3));
        assert_eq!((set.end_of(9), set.end_of(20), set.end_of(21), set.end_of(8)), (Some(21), Some(21), None, None));
        set.fill();
        // A hole makes one more of one.
        set.remove(20..22, 2);
        set.remove(30..31, 2);
        set.remove(9..10, 2);
        assert!(set.take().flatten().eq((10..20).chain(31..41)));
    }

    #[test]
    fn nothing_is_nothing() {
        let mut set = ClusterSet::default();
        set.fill();
        set.remove(0..u64::MAX, 1);
        assert!(set.insert(5, 1));
        set.remove(5..5, 1);
        set.remove(0..0, 1);
        assert!(set.take().flatten().eq(5..6));
    }
}
