"use strict";
const byId = id => document.getElementById(id);
const settings = JSON.parse(byId("settings").textContent);
const [low, high] = settings.jacobian_range;
byId("low").textContent = low;
byId("high").textContent = high;

const bytes = name => Uint8Array.from(atob(byId("volume-" + name).textContent), c => c.charCodeAt(0)).buffer;
const names = ["fixed", "moving", "warped", "jacobian", "grid"]; // in this order, the first below

async function start() {
  const viewer = new globalThis.Niivue({
    crosshairWidth: 0.5, backColor: [0.07, 0.07, 0.07, 1], crosshairColor: [1, 0.8, 0.2, 0.8], show3Dcrosshair: true, isColorbar: false,
    loadingText: "", logLevel: "error", isRadiologicalConvention: true,
  });
  viewer.onLocationChange = place => {
    const [x, y, z] = place.mm;
    byId("location").textContent = `R ${x.toFixed(1)}  A ${y.toFixed(1)}  S ${z.toFixed(1)} mm`;
  };
  await viewer.attachToCanvas(byId("canvas"));
  // as "gray", but what is dark hides what lies below
  viewer.addColormap("opaque", {R: [0, 255], G: [0, 255], B: [0, 255], A: [255, 255], I: [0, 255]});
  for (const name of names) {
    await viewer.loadFromArrayBuffer(bytes(name), name + ".nii.gz");
    const volume = viewer.volumes.at(-1);
    if (name === "moving" || name === "warped") volume.colormap = "opaque";
    if (name === "jacobian") {
      viewer.addColormap("jacobian", {R: [0, 255, 255], G: [0, 255, 0], B: [255, 255, 0], A: [255, 255, 255], I: [0, 128, 255]});
      volume.cal_min = low;
      volume.cal_max = high;
      volume.colormap = "jacobian";
    }
    if (name === "grid") volume.colormap = "hot";
    volume.opacity = 0;
  }
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  const show = () => {
    const after = Number(byId("time").value), side = Number(byId("side").value);
    const opacity = [1, side * (after < 1 ? 1 : 0), side * after,
      byId("jacobian").checked ? 0.5 : 0, byId("grid").checked ? 0.6 : 0];
    viewer.volumes.forEach((volume, k) => { volume.opacity = opacity[k]; });
    viewer.updateGLVolume();
    byId("legend").hidden = !byId("jacobian").checked;
  };
  for (const id of ["time", "side", "jacobian", "grid"]) byId(id).oninput = show;
  show();
  viewer.createOnLocationChange();
  document.body.dataset.ready = "yes";
}
start().catch(error => { byId("problem").textContent = `The images cannot be shown: ${error.message ?? error}`; });
