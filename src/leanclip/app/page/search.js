export function startSearch() {
  return { shown: () => {}, about: () => {} };
}
