export function startRuns() {
  return () => {};
}
